"""Hugging Face transformers, random weights, small configurations."""

import pytest
import torch
from oracle.equal_to_loop import assert_equal_to_loop

transformers = pytest.importorskip("transformers", reason="transformers is not installed (make test-models)")

B, T = 4, 6
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert(attention: str):
    config = transformers.BertConfig(vocab_size=63, num_labels=3, attn_implementation=attention, **SIZES)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, 4:] = 0
    return transformers.BertForSequenceClassification(config), {"input_ids": torch.randint(63, (B, T)), "attention_mask": mask}


def gpt2(attention: str):
    config = transformers.GPT2Config(
        vocab_size=63, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    config._attn_implementation = attention
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(63, (B, T))}


def vit(attention: str):
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.2,
        num_labels=3,
        attn_implementation=attention,
        **SIZES,
    )
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(B, 3, 16, 16, dtype=torch.float64)}


# Masks are made behind the first noise from inputs without: there a place inside does not fit.
PLACES = {bert: "bert", gpt2: "transformer", vit: "first"}


@pytest.mark.parametrize("expand", ["axis", "input", "inside"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [bert, gpt2, vit])
def test_model(make, attention, expand):
    """Attention by torch's fused function and by softmax and F.dropout."""
    model, inputs = make(attention)
    audit = assert_equal_to_loop(model, inputs, lambda y: y.logits, PLACES[make] if expand == "inside" else expand)
    functions = {call.function.rsplit(".", 1)[-1] for call in audit.replaced}
    assert functions == ({"scaled_dot_product_attention"} if attention == "sdpa" else {"dropout"})


@pytest.mark.parametrize("make", [bert, gpt2, vit])
def test_gradient_checkpointing(make):
    """Hugging Face's own, which knows nothing of contexts: the recompute draws the noise of its forward."""
    model, inputs = make("eager")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal_to_loop(model, inputs, lambda y: y.logits)
