"""Characters of Python's own standard library, 100,000 to learn from: an LSTM or a transformer that predicts the next one."""

import platform
import sysconfig
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import TensorDataset

from .packaged import number, sha256
from .recipe import Data, Missing, OptionGroup

# 100,000 characters are 97 batches of sequences: 10 epochs are 970 steps.
DEFAULTS = {"samples": [1, 4, 8], "alpha": [1.0], "rate": [0.2, 0.4], "batch": 16, "epochs": 10}
QUICK = {"samples": [1, 4], "rate": [0.2], "epochs": 1}
LEARNING_RATE = 2e-3
TEST_CHARACTERS = 100_000
# Modules that every supported Python has as one file. Its version decides what they say: facts() has the digest of the text.
# fmt: off
TRAIN = (
    "bisect", "calendar", "cmd", "codeop", "colorsys", "copy", "fnmatch", "getopt", "heapq", "linecache", "queue", "random", "reprlib",
    "sched", "shelve", "shlex", "statistics", "textwrap", "timeit", "tokenize",
)
# fmt: on
TEST = ("csv", "filecmp", "gettext", "glob", "hmac", "mimetypes", "ntpath", "uuid")
SYMBOLS = "\n" + "".join(map(chr, range(32, 127)))
OTHER = len(SYMBOLS)  # one class for all characters that are not among them
CLASSES = OTHER + 1


def add_options(group: OptionGroup) -> None:
    group.add_argument("--model", choices=MODELS, default="lstm", help="what learns them")
    group.add_argument("--length", type=number(2, 1000), default=64, help="characters of a sequence")
    group.add_argument("--train-characters", type=number(2000, 10**6), default=100_000, help="characters to learn from")


def read(modules: tuple[str, ...], characters: int) -> str:
    """The first characters of the modules' text, one module after the other."""
    folder, text = Path(sysconfig.get_path("stdlib")), ""
    for module in modules:
        if len(text) < characters:
            path = folder / f"{module}.py"
            try:
                text += path.read_text(encoding="utf-8")
            except OSError as error:
                raise Missing(f"{path}: {error.strerror}; this recipe reads the source of Python's standard library") from None
    return text[:characters]


def train_text(settings: Namespace) -> str:
    text = read(TRAIN, settings.train_characters)
    if len(text) < settings.train_characters:
        raise Missing(f"--train-characters {settings.train_characters}: the modules of Python {platform.python_version()} have {len(text)}")
    return text


def sequences(text: str, length: int) -> TensorDataset:
    """Inputs are [N, length] that follow each other without overlap; each one's target is the character after it."""
    numbers = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    codes = torch.tensor([numbers.get(character, OTHER) for character in text])
    rows = (len(codes) - 1) // length
    return TensorDataset(codes[: rows * length].view(rows, length), codes[1 : rows * length + 1].view(rows, length))


def load(settings: Namespace) -> Data:
    """Test sequences are of other modules than those that are learnt from."""
    return Data(sequences(train_text(settings), settings.length), sequences(read(TEST, TEST_CHARACTERS), settings.length), CLASSES)


class LSTM(nn.Module):
    """Two layers with dropout before, between and after them; logits [B, C, T]."""

    def __init__(self, length: int, p: float, width: int = 64):
        super().__init__()
        self.tokens = nn.Embedding(CLASSES, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, dropout=p, batch_first=True)
        self.dropout1, self.dropout2, self.head = nn.Dropout(p), nn.Dropout(p), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout2(self.lstm(self.dropout1(self.tokens(x)))[0])).transpose(1, 2)


class Transformer(nn.Module):
    """Decoder of torch's own layers, which have dropout on attention's weights, inside the two-layer network and after both."""

    def __init__(self, length: int, p: float, width: int = 64, depth: int = 2, heads: int = 4):
        super().__init__()
        self.tokens, self.positions, self.dropout = nn.Embedding(CLASSES, width), nn.Embedding(length, width), nn.Dropout(p)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)  # as GPT-2's: with torch's 1 it learns more slowly
        # Made one by one: nn.TransformerEncoder would copy one layer, and all would begin with the same weights.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, p, "gelu", batch_first=True, norm_first=True) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.tokens(x) + self.positions.weight)
        for layer in self.layers:
            h = layer(h, self.mask, is_causal=True)
        return self.head(self.norm(h)).transpose(1, 2)


MODELS = {"lstm": LSTM, "transformer": Transformer}


def build(settings: Namespace, data: Data) -> nn.Module:
    return MODELS[settings.model](settings.length, settings.rate)


def optimizer(settings: Namespace, model: nn.Module, steps: int) -> tuple[Adam, None]:
    return Adam(model.parameters(), LEARNING_RATE), None


def facts(settings: Namespace) -> dict[str, str]:
    train, test = train_text(settings), read(TEST, TEST_CHARACTERS)
    return {
        "data": f"standard library of Python {platform.python_version()}",
        "sha256 of the training text": sha256(train.encode()),
        "sha256 of the test text": sha256(test.encode()),
    }
