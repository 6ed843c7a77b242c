"""Recurrent layers with S noise samples of the dropout between their layers: drop-in for torch's, one fused call for each layer.

Where the input has B rows, the layers before the first dropout run on B rows; from there on every layer runs on S*B.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ..checks import check, check_probability
from ..ops.noise import dropout_rule
from .context import ambient, current, draw

_KERNELS = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}


class _Recurrent(nn.RNNBase):
    """The base: torch's module in eval mode; in training its layers one after another, with noise between them."""

    locked = False  # on the class, too, for a module of torch's whose class was swapped

    def __init__(self, *args: Any, locked: bool = False, **kwargs: Any):
        if not isinstance(locked, bool):
            raise TypeError(f"locked: expected a bool, got {type(locked).__name__}")
        super().__init__(*args, **kwargs)
        self.locked = locked

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        noisy = self.dropout > 0 and self.num_layers > 1
        if not self.training or not (noisy or self._rows_meet(input, hx)):
            return super().forward(input, hx)
        check_probability(self.dropout, "dropout")
        out: Any
        states: Any = hx if isinstance(hx, tuple | list) else () if hx is None else (hx,)
        check(len(states) in (0, 1 + (self.mode == "LSTM")), "hx", "(h, c) for an LSTM, else h", f"{len(states)} tensors")
        if isinstance(input, PackedSequence):
            x, lengths = pad_packed_sequence(input)
            out, states, several = self._layers(x, states, lengths)
            out = pack_padded_sequence(out, cast(Tensor, several), enforce_sorted=False)
        elif input.dim() == 2:
            check(current() is None, "input", "rows to expand, [rows, T, F] or [T, rows, F], in iw.sampling", "an unbatched one")
            out, states, _ = self._layers(input.unsqueeze(1), [state.unsqueeze(1) for state in states], None)
            out, states = out.squeeze(1), [state.squeeze(1) for state in states]
        else:
            check(input.dim() == 3, "input", "[rows, T, F] where batch_first, else [T, rows, F]", tuple(input.shape))
            # Time-major in memory, as torch's kernels compute: the noise of an address does not depend on it.
            out, states, _ = self._layers(input.transpose(0, 1) if self.batch_first else input, states, None)
            out = out.transpose(0, 1) if self.batch_first else out
        return out, tuple(states) if self.mode == "LSTM" else states[0]

    def _layers(self, x: Tensor, states, lengths: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """(out [T, S*B, F], final states [layers * directions, S*B, .], lengths [S*B]) of x [T, R, F] and states of R rows, B or S*B."""
        if x.dtype != self.weight_ih_l0.dtype or x.shape[2] != self.input_size:
            self.check_input(x, None)  # raises torch's own errors, but for a dtype that autocast converts
        context = ambient(self)
        samples, batch = context.samples, context.examples(x.shape[1])
        directions = 1 + self.bidirectional
        widths = (self.proj_size or self.hidden_size, self.hidden_size)[: 1 + (self.mode == "LSTM")]
        if not states:
            states = [x.new_zeros(self.num_layers * directions, x.shape[1], width) for width in widths]
        for state, width in zip(states, widths, strict=True):
            if state.dim() != 3 or (state.shape[0], state.shape[2]) != (self.num_layers * directions, width):
                raise ValueError(f"hx: expected [{self.num_layers * directions}, rows, {width}], got {tuple(state.shape)}")
            if state.shape[1] not in (batch, samples * batch):
                several = samples == 1 and state.shape[1] % batch == 0 if batch else False
                hint = (
                    ". Are these S*B states of the call before? A converted model takes them with expand='first' (and batch_dim=1 where "
                    "time is first); on the sample axis states can pass from step to step inside of one forward only"
                )
                raise ValueError(
                    f"hx: expected {batch} rows, or {samples} samples * {batch} = {samples * batch}, got {state.shape[1]}{hint * several}"
                )
            if state.shape[1] != batch:
                x = _expanded(x, samples, batch)  # states of the step before: each layer has one for each sample
        finals = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0:
                x = draw(x, dropout_rule(self.dropout), "feature" if self.locked else "element", 1, self)
            of_layer = slice(layer * directions, (layer + 1) * directions)
            before = [state[of_layer] if x.shape[1] == batch else _expanded(state[of_layer], samples, batch) for state in states]
            if lengths is not None and len(lengths) != x.shape[1]:
                lengths = lengths.repeat(samples)
            x, *after = self._layer(x, before, [w for weights in self.all_weights[of_layer] for w in weights], lengths)
            finals.append(after)
        if x.shape[1] != batch:
            finals = [[_expanded(state, samples, batch) for state in after] for after in finals]
        return x, [torch.cat(of_layers) for of_layers in zip(*finals, strict=True)], lengths

    def _layer(self, x: Tensor, states: list[Tensor], weights: list[Tensor], lengths: Tensor | None) -> tuple[Tensor, ...]:
        kernel: Any = _KERNELS[self.mode]
        options = (weights, self.bias, 1, 0.0, self.training, self.bidirectional)
        if lengths is None:
            return kernel(x, tuple(states) if self.mode == "LSTM" else states[0], *options, False)
        packed: Any = pack_padded_sequence(x, lengths, enforce_sorted=False)
        states = [state.index_select(1, packed.sorted_indices) for state in states]
        out, *states = kernel(packed.data, packed.batch_sizes, tuple(states) if self.mode == "LSTM" else states[0], *options)
        out, _ = pad_packed_sequence(packed._replace(data=out), total_length=x.shape[0])
        return out, *(state.index_select(1, packed.unsorted_indices) for state in states)

    def _rows_meet(self, input, hx) -> bool:
        """True where, in a context, the states have another number of rows than the input."""
        packed = isinstance(input, PackedSequence)
        if hx is None or current() is None or not (packed or input.dim() == 3):
            return False
        rows = input.batch_sizes[0] if packed else input.shape[0 if self.batch_first else 1]
        return any(state.dim() == 3 and state.shape[1] != rows for state in (hx if isinstance(hx, tuple | list) else (hx,)))

    def extra_repr(self) -> str:
        return super().extra_repr() + (", locked=True" if self.locked else "")


def _expanded(x: Tensor, samples: int, batch: int) -> Tensor:
    """x [., B, .] repeated over the samples; [., S*B, .] as it is."""
    if x.shape[1] != batch:
        return x
    return x.unsqueeze(1).expand(x.shape[0], samples, batch, x.shape[2]).flatten(1, 2)


class IWLSTM(_Recurrent, nn.LSTM):
    """:class:`torch.nn.LSTM` with S noise samples per example inside ``iw.sampling(S)`` (Noh et al. 2017, eq 1): the dropout between its
    layers is drawn from the context.

    Constructor, parameters and state_dict are torch's, so a module's class can be swapped in place. In eval mode, and without dropout
    between layers, it is torch's module. In training it calls torch's fused kernel once for each layer; each dropout takes one stream.

    Args:
        args, kwargs: as :class:`torch.nn.LSTM`.
        locked: True draws one mask for all time steps, for each example and feature, instead of one for each step. On a module whose
            class was swapped, set the attribute.

    Shape:
        Rows are in dimension 0 where ``batch_first``, else 1 (the context's ``batch_dim`` is not used), with the same noise for both.
        The input has B or S*B rows. So have initial states, independently of it: B states serve all samples, and S*B states (of the step
        before, in truncated backpropagation) expand the input. Output and final states have S*B rows, in all layers. A PackedSequence
        gives a PackedSequence of S*B sequences.

    Returns:
        (output, final states), as torch's module.

    Raises:
        ValueError: the number of rows is neither B nor S*B; an unbatched input inside of a sampling context (it has no rows to expand).

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> lstm = iw.IWLSTM(4, 8, num_layers=2, dropout=0.5, batch_first=True, locked=True)
        >>> with iw.sampling(3):
        ...     out, (h, c) = lstm(torch.randn(2, 5, 4))
        >>> out.shape, h.shape
        (torch.Size([6, 5, 8]), torch.Size([2, 6, 8]))
    """


class IWGRU(_Recurrent, nn.GRU):
    """:class:`torch.nn.GRU` with S noise samples per example inside ``iw.sampling(S)`` (Noh et al. 2017, eq 1).

    Args, Shape, Returns, Raises:
        as :class:`IWLSTM`, with the options of :class:`torch.nn.GRU`.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> gru = torch.nn.GRU(4, 8, num_layers=2, dropout=0.5)
        >>> gru.__class__ = iw.IWGRU
        >>> with iw.sampling(3):
        ...     out, h = gru(torch.randn(5, 2, 4))
        >>> out.shape, h.shape
        (torch.Size([5, 6, 8]), torch.Size([2, 6, 8]))
    """


class IWRNN(_Recurrent, nn.RNN):
    """:class:`torch.nn.RNN` with S noise samples per example inside ``iw.sampling(S)`` (Noh et al. 2017, eq 1).

    Args, Shape, Returns, Raises:
        as :class:`IWLSTM`, with the options of :class:`torch.nn.RNN`.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> rnn = iw.IWRNN(4, 8, 2, "relu", dropout=0.5)
        >>> rnn.eval()(torch.randn(5, 2, 4))[0].shape
        torch.Size([5, 2, 8])
    """
