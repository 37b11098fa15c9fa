"""The LSTM and its variants, which are one rule with options.

    i, f = sigmoid(W x_t + R h_{t-1} + p c_{t-1} + b);   z = tanh(W x_t + R h_{t-1} + b)
    c_t = f c_{t-1} + i z
    o = sigmoid(W x_t + R h_{t-1} + p c_t + b);          h_t = P (o tanh(c_t))

LSTM           p = 0, P = 1 (Hochreiter and Schmidhuber 1997; forget gate: Gers, Schmidhuber and Cummins 2000)
PeepholeLSTM   p diagonal (Gers and Schmidhuber 2000)
CoupledLSTM    f = 1 - i, the CIFG of Greff et al.
ProjectedLSTM  P a matrix to fewer units (LSTMP: Sak, Senior and Beaufays 2014, arXiv:1402.1128, eqs. 7-13)
LayerNormLSTM  gates LN(W x_t) + LN(R h_{t-1}) + b, and h_t = o tanh(LN(c_t)) (Ba, Kiros and Hinton 2016,
               arXiv:1607.06450, eqs. 20-22); LN over all gates together, each with a gain; that of c also with a bias

The eight changes of "LSTM: a search space odyssey" (Greff et al. 2017, arXiv:1503.04069, section 3), whose vanilla LSTM
has peepholes, are arguments: `input_gate`, `forget_gate`, `output_gate` (NIG, NFG, NOG: the gate is 1),
`input_activation`, `output_activation` (NIAF, NOAF: z, and tanh(c), are linear), `peephole` (NP), `coupled` (CIFG),
`gate_recurrence` (FGR: each gate also sees all gates of the step before through a full matrix).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import sigmoid
from jaxtyping import Array, Float

from ..kernels.choice import CHOSEN_FORMS
from ..kernels.rules import stack
from .base import RecurrentCell


class LSTMState(NamedTuple):
    c: Float[Array, "B D"]
    h: Float[Array, "B H"]


class GateRecurrentState(NamedTuple):
    """With the gates' activations, side by side."""

    c: Float[Array, "B D"]
    h: Float[Array, "B D"]
    gates: Float[Array, "B GD"]


@dataclass(frozen=True)
class LSTMRule:
    """params may have "peephole" {gate: p}, "gain" (G, D) of x, r and "bias" (G, D), "gain_c" and "bias_c"."""

    gates: tuple[str, ...] = ("i", "f", "z", "o")
    coupled: bool = False
    input_activation: bool = True
    output_activation: bool = True
    gate_clip: float | None = None
    cell_clip: float | None = None
    projected: bool = False

    @property
    def cudnn_gates(self) -> tuple[int, ...] | None:
        """Where i, f, z and o are, if the options leave the LSTM that cuDNN has."""
        plain = LSTMRule(self.gates) == self and sorted(self.gates) == ["f", "i", "o", "z"]
        return tuple(map(self.gates.index, "ifzo")) if plain else None

    def __call__(self, x, r, state, params):
        c, m, _ = self.memory(x, r, state, params)
        h = r[-1] if self.projected else m
        return LSTMState(c, h), h

    def inner(self, x, r, state, params):
        """What P multiplies."""
        return self.memory(x, r, state, params)[1]

    def preactivations(self, x, r, state, params):
        """Of the gates, by name, and with all that the options add to W x + R h + b."""
        return self.memory(x, r, state, params)[2]

    def memory(self, x, r, state, params):
        """The new c, the output o tanh(c), and the gates' pre-activations."""
        if "gain_x" in params:
            shares = ((x, "gain_x"), (r[: len(x)], "gain_r"))  # after r comes what is projected
            x, r = (jnp.unstack(normalized(stack(a), params[gain]), axis=-2) for a, gain in shares)
            if "bias" in params:
                x = tuple(a + b for a, b in zip(x, params["bias"]))
        share = {gate: a + b for gate, a, b in zip(self.gates, x, r)}
        peephole = params["peephole"] if "peephole" in params else {}

        def gate(name, c):
            a = share[name] + peephole[name] * c if name in peephole else share[name]
            return clipped(a, self.gate_clip)

        z = clipped(share["z"], self.gate_clip)
        gates = {name: gate(name, state.c) for name in ("i", "f") if name in share}
        i = sigmoid(gates["i"]) if "i" in gates else 1.0
        f = 1 - i if self.coupled else sigmoid(gates["f"]) if "f" in gates else 1.0
        c = clipped(f * state.c + i * (jnp.tanh(z) if self.input_activation else z), self.cell_clip)
        if "o" in share:
            gates["o"] = gate("o", c)
        out = c if "gain_c" not in params else normalized(c, params["gain_c"], axes=(-1,)) + params["bias_c"]
        out = jnp.tanh(out) if self.output_activation else out
        return c, sigmoid(gates["o"]) * out if "o" in gates else out, gates


@dataclass(frozen=True)
class GateRecurrentRule(LSTMRule):
    """Full gate recurrence: S multiplies the last step's gates, and each gate adds its share of that."""

    def inner(self, x, r, state, params):
        return state.gates

    def memory(self, x, r, state, params):
        """As without, of gates that have that share too."""
        G = len(self.gates)
        seen = dict(zip((gate for gate in self.gates if gate != "z"), r[G:]))
        r = tuple(a + seen[gate] if gate in seen else a for gate, a in zip(self.gates, r))
        return super().memory(x, r, state, params)

    def __call__(self, x, r, state, params):
        c, h, gates = self.memory(x, r, state, params)
        return GateRecurrentState(c, h, sigmoid(jnp.concatenate(list(gates.values()), axis=-1))), h


def clipped(a: Array, limit: float | None) -> Array:
    """Within +- limit, if there is one."""
    return a if limit is None else jnp.clip(a, -limit, limit)


def normalized(a: Array, gain: Array, axes: tuple[int, ...] = (-2, -1)) -> Array:
    """Layer norm over the last axes times a gain."""
    return jax.nn.standardize(a, axis=axes, epsilon=1e-5) * gain


class LSTM(RecurrentCell):
    """LSTM; `forget_bias` is the forget gate's initial bias, 1 (Jozefowicz et al. 2015) if not given, or "chrono(T)".

    projection: the width of h if it is projected. gate_clip, cell_clip: limits of the pre-activations and of c.
    With coupled gates `forget_bias` is that of 1 - i.
    """

    State, zoneout_fields, default_forget_bias = LSTMState, ("c", "h"), 1.0
    chosen_forms = (*CHOSEN_FORMS, "cudnn")

    def __init__(
        self,
        in_features: int | None,
        features: int,
        *,
        peephole: bool = False,
        coupled: bool = False,
        projection: int | None = None,
        layer_norm: bool = False,
        input_gate: bool = True,
        forget_gate: bool = True,
        output_gate: bool = True,
        input_activation: bool = True,
        output_activation: bool = True,
        gate_recurrence: bool = False,
        gate_clip: float | None = None,
        cell_clip: float | None = None,
        **options,
    ):
        if coupled and not (input_gate and forget_gate):
            raise ValueError("coupled=True means f = 1 - i: it goes with input_gate=True and forget_gate=True only")
        if gate_recurrence and (projection or layer_norm or options.get("num_heads", 1) > 1):
            raise ValueError("gate_recurrence=True goes with neither projection nor layer_norm nor several heads")
        for name, size in {"projection": projection, "gate_clip": gate_clip, "cell_clip": cell_clip}.items():
            if size is not None and size <= 0:
                raise ValueError(f"{name} is {size}: it must be above 0")
        present = {"i": input_gate, "f": forget_gate and not coupled, "z": True, "o": output_gate}
        self.gates = tuple(gate for gate, there in present.items() if there)
        self.sigmoids = tuple(gate for gate in self.gates if gate != "z")
        if (peephole or gate_recurrence) and not self.sigmoids:
            raise ValueError("peephole and gate_recurrence need a gate; input, forget and output gate are all off")
        self.forget_gate, self.forget_sign = ("i", -1) if coupled else ("f" if forget_gate else None, 1)
        self.input_gate = "i" if input_gate and not coupled else None
        rule = GateRecurrentRule if gate_recurrence else LSTMRule
        activations = dict(input_activation=input_activation, output_activation=output_activation)
        clips = dict(gate_clip=gate_clip, cell_clip=cell_clip)
        self.rule = rule(self.gates, coupled, projected=projection is not None, **activations, **clips)
        if projection:
            self.inner_shape, self.hidden = (features, 1, projection), projection
        if gate_recurrence:
            G = len(self.sigmoids)
            self.State, self.inner_shape = GateRecurrentState, (G * features, G, features)
        super().__init__(in_features, features, **options)
        D, dtype = self.features, self.param_dtype
        self.peephole = nnx.Param(jnp.zeros((len(self.sigmoids), *self.peephole_shape()), dtype)) if peephole else None
        self.layer_norm = layer_norm
        if layer_norm:
            self.gain_x, self.gain_r = (nnx.Param(jnp.ones((len(self.gates), D), dtype)) for _ in "xr")
            self.gain_c, self.bias_c = nnx.Param(jnp.ones(D, dtype)), nnx.Param(jnp.zeros(D, dtype))

    def gate_bias(self):
        """With layer norm the bias comes after it, in the rule."""
        return None if self.layer_norm else super().gate_bias()

    def peephole_shape(self) -> tuple[int, ...]:
        """Of one gate's weights."""
        return (self.features,)

    def rule_params(self):
        params = {}
        if self.peephole is not None:
            params["peephole"] = {gate: self.as_gate(p) for gate, p in zip(self.sigmoids, self.peephole)}
        if self.layer_norm:
            gains = ("gain_x", "gain_r", "gain_c", "bias_c")
            params |= {name: self.as_gate(getattr(self, name)[...]) for name in gains}
            if self.b is not None:
                params["bias"] = [self.as_gate(b) for b in self.b]
        return params

    def state_widths(self):
        width = {"gates": self.inner_shape[0]} if self.State is GateRecurrentState else {}
        return super().state_widths() | width


class PeepholeLSTM(LSTM):
    """LSTM with peepholes: i and f see the old c, o the new one (Gers and Schmidhuber 2000); they start from 0."""

    def __init__(self, in_features: int | None, features: int, **options):
        super().__init__(in_features, features, peephole=True, **options)


class CoupledLSTM(LSTM):
    """LSTM with f = 1 - i (CIFG, Greff et al. 2017), three gates; `forget_bias` 1 is an input bias of -1."""

    def __init__(self, in_features: int | None, features: int, **options):
        super().__init__(in_features, features, coupled=True, **options)


class ProjectedLSTM(LSTM):
    """LSTM whose h has `projection` units, in the paper fewer than c (LSTMP, Sak et al. 2014); more are served too.

    P is S (N, D/N, 1, projection/N).
    """

    def __init__(self, in_features: int | None, features: int, *, projection: int, **options):
        super().__init__(in_features, features, projection=projection, **options)


class LayerNormLSTM(LSTM):
    """LSTM with layer norm of both shares of the gates and of c (Ba et al. 2016)."""

    def __init__(self, in_features: int | None, features: int, **options):
        super().__init__(in_features, features, layer_norm=True, **options)
