"""Networks with curved operations, each with a twin in which every gate is detached by hand.

A twin is written without the engine. It gets the network, the images and a :class:`Hold`: it passes
each gate through ``hold.gate`` and each constant that is an entry of ``b`` through ``hold.entry``.
Without detaching it computes the same values; with detaching its gradient is the hyperplane.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from cases import Net, enliven, parameter
from torch import Tensor, nn


@dataclass
class Hold:
    """What a twin holds constant, and its constants.

    Attributes:
        detaches: Whether gates are detached.
        entries: Name of an entry -> a tensor with the value of it.
    """

    detaches: bool = True
    entries: dict[str, Tensor] = field(default_factory=dict)

    def gate(self, gate: Tensor) -> Tensor:
        """A gate, which has no gradient if gates are detached."""
        return gate.detach() if self.detaches else gate

    def entry(self, name: str, value: float) -> Tensor:
        """A constant that is an entry of ``b``."""
        one = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        return self.entries.setdefault(name, one)


@dataclass(frozen=True)
class CurvedCase:
    """A network and its twin."""

    build: Callable[[], tuple[nn.Module, tuple[int, ...]]]
    twin: Callable[[nn.Module, Tensor, Hold], Tensor]


CASES: dict[str, CurvedCase] = {}
SEED = 31


def case(twin: Callable[[nn.Module, Tensor, Hold], Tensor]) -> Callable:
    """Put a network into the catalogue under its function's name, with its twin."""

    def keep(build: Callable[[], tuple[nn.Module, tuple[int, ...]]]) -> Callable:
        CASES[build.__name__.replace("_", "-")] = CurvedCase(build, twin)
        return build

    return keep


def make(name: str, images: int = 2) -> tuple[nn.Module, Tensor, Callable]:
    """A network of the catalogue, some images and its twin, always the same."""
    chosen = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model, shape = chosen.build()
        enliven(model)
        for values in model.parameters():
            if values.dim() == 1:  # no bias and no weight of a norm hides at 0 or 1
                nn.init.uniform_(values, 0.3, 1.2)
        x = torch.randn(images, *shape, dtype=torch.float64)
    return model.double().eval(), x, chosen.twin


# functions of one number


def quotient(hold: Hold, u: Tensor, value: Tensor, at_zero: float = 0.0, name: str = "") -> Tensor:
    """``f(0) + u [(f(u) - f(0)) / u]``."""
    gated = u * hold.gate((value - at_zero) / u)
    return gated + hold.entry(name, at_zero) if at_zero else gated


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "gelu": (F.gelu, 0.0),
    "gelu-tanh": (lambda u: F.gelu(u, approximate="tanh"), 0.0),
    "silu": (F.silu, 0.0),
    "mish": (F.mish, 0.0),
    "hardswish": (F.hardswish, 0.0),
    "sigmoid": (torch.sigmoid, 0.5),
    "tanh": (torch.tanh, 0.0),
    "softplus": (lambda u: F.softplus(u, 2.0), math.log(2) / 2),
    "elu": (lambda u: F.elu(u, 0.7), 0.0),
    "selu": (F.selu, 0.0),
    "celu": (lambda u: F.celu(u, 0.6), 0.0),
    "exp": (torch.exp, 1.0),
    "erf": (torch.erf, 0.0),
    "sin": (torch.sin, 0.0),
    "cos": (torch.cos, 1.0),
    "logsigmoid": (F.logsigmoid, -math.log(2)),
    "cube": (lambda u: u**3, 0.0),
    "power": (lambda u: 1.7**u, 1.0),
}
"""Functions of any number, and their values at zero."""
POSITIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "root": lambda u: u**0.3,
}
"""Functions of positive numbers that have no finite value or slope at zero."""


def of_each(net, x):
    """All functions, each on two features."""
    u = net.first(x)
    parts = [f(u[:, i : i + 2]) for i, (f, _) in enumerate(FUNCTIONS.values())]
    positive = F.relu(u) + 0.5
    parts += [f(positive[:, i : i + 2]) for i, f in enumerate(POSITIVE.values())]
    return torch.cat([*parts, F.softsign(u)], 1)


def of_each_twin(net, x, hold):
    """The same from quotients; softsign has the gate ``1 / (1 + |u|)``."""
    u = net.first(x)
    parts = []
    for i, (name, (f, at_zero)) in enumerate(FUNCTIONS.items()):
        own = u[:, i : i + 2]
        parts.append(quotient(hold, own, f(own), at_zero, name))
    positive = F.relu(u) + hold.entry("half", 0.5)
    for i, f in enumerate(POSITIVE.values()):
        own = positive[:, i : i + 2]
        parts.append(quotient(hold, own, f(own)))
    return torch.cat([*parts, u * hold.gate(1 / (1 + u.abs()))], 1)


@case(of_each_twin)
def functions_of_one_number():
    return Net(of_each, first=nn.Linear(5, len(FUNCTIONS) + 1)), (5,)


def gelu_of_maps(net, x, hold):
    u = net[0](x)
    u = net[2](u * hold.gate(0.5 * (1 + torch.erf(u / math.sqrt(2)))))
    return net[4](u * hold.gate(torch.sigmoid(u)))


@case(gelu_of_maps)
def convolutions_with_gelu_and_silu():
    convs = [nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, 2), nn.Conv2d(3, 2, 1)]
    return nn.Sequential(convs[0], nn.GELU(), convs[1], nn.SiLU(), convs[2]), (2, 7, 7)


def gpt2_gelu_twin(net, x, hold):
    u = net.up(x)
    inner = math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)
    return net.down(0.5 * u * hold.gate(1 + torch.tanh(inner)))


@case(gpt2_gelu_twin)
def written_out_gelu():
    return Net(
        lambda net, x: gpt2_gelu_twin(net, x, Hold(False)), up=nn.Linear(4, 6), down=nn.Linear(6, 3)
    ), (3, 4)


# norms


def centred(x, dims):
    return x - x.mean(dims, keepdim=True)


def norm_twin(hold, x, dims, eps):
    c = centred(x, dims)
    return c * hold.gate(1 / (c.square().mean(dims, keepdim=True) + eps).sqrt())


def norms_twin(net, x, hold):
    x = net.first(x)
    x = net.conv(norm_twin(hold, x, (2, 3), net.instance.eps) * by_channel(net.instance.weight)
                 + by_channel(net.instance.bias))  # fmt: skip
    groups = norm_twin(hold, x.unflatten(1, (2, 2)).flatten(2), (2,), net.group.eps)
    x = groups.reshape(x.shape) * by_channel(net.group.weight) + by_channel(net.group.bias)
    x = x.flatten(2)
    x = norm_twin(hold, x, (2,), net.layer.eps) * net.layer.weight + net.layer.bias
    rms = (x.square().mean(-1, keepdim=True) + net.rms.eps).sqrt()
    x = x * hold.gate(1 / rms) * net.rms.weight
    return x * hold.gate(1 / x.norm(dim=1, keepdim=True))


def by_channel(values):
    return values[:, None, None]


@case(norms_twin)
def norms_of_every_kind():
    def forward(net, x):
        x = net.group(net.conv(net.instance(net.first(x))))
        return F.normalize(net.rms(net.layer(x.flatten(2))), dim=1)

    return Net(
        forward,
        first=nn.Conv2d(2, 3, 2),
        instance=nn.InstanceNorm2d(3, eps=0.04, affine=True),
        conv=nn.Conv2d(3, 4, 2),
        group=nn.GroupNorm(2, 4, eps=0.05),
        layer=nn.LayerNorm(9, eps=0.06),
        rms=nn.RMSNorm(9, eps=0.07),
    ), (2, 5, 5)


def local_response_twin(net, x, hold):
    x = net[0](x)
    padded = F.pad(x.square(), (0, 0, 0, 0, 1, 1))
    sums = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return net[2](x * hold.gate((1.5 + 0.4 * sums / 3) ** -0.75))


@case(local_response_twin)
def local_response_norm():
    norm = nn.LocalResponseNorm(3, alpha=0.4, beta=0.75, k=1.5)
    return nn.Sequential(nn.Conv2d(2, 4, 2), norm, nn.Conv2d(4, 2, 2)), (2, 4, 4)


def norm_values_twin(net, x, hold):
    x = net.first(x)
    c = centred(x, (-1,))
    length = (x * hold.gate(x / x.norm(dim=-1, keepdim=True))).sum(-1, keepdim=True)
    deviation = (c.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()
    spread = (c * hold.gate(c / deviation / (x.shape[-1] - 1))).sum(-1, keepdim=True)
    variance = (c * hold.gate(c / (x.shape[-1] - 1))).sum(-1, keepdim=True)
    return torch.cat([length, spread, variance], -1)


@case(norm_values_twin)
def norms_as_values():
    def forward(net, x):
        x = net.first(x)
        parts = [x.norm(dim=-1, keepdim=True), x.std(-1, keepdim=True), x.var(-1, keepdim=True)]
        return torch.cat(parts, -1)

    return Net(forward, first=nn.Linear(4, 5)), (3, 4)


# products


def squeeze_twin(net, x, hold):
    x = net.conv(x)
    scale = net.up(F.silu(net.down(x.mean((2, 3), keepdim=True))))
    return net.last(x * hold.gate(torch.sigmoid(scale)))


@case(squeeze_twin)
def squeeze_and_excitation():
    return Net(
        lambda net, x: squeeze_twin(net, x, Hold(False)),
        conv=nn.Conv2d(2, 4, 3),
        down=nn.Conv2d(4, 2, 1),
        up=nn.Conv2d(2, 4, 1),
        last=nn.Conv2d(4, 2, 2),
    ), (2, 5, 5)


def gated_units_twin(net, x, hold):
    swi, swi_gate, ge, ge_gate, glu, glu_gate = net.first(x).chunk(6, -1)
    swi = swi * hold.gate(F.silu(swi_gate))
    ge = ge * hold.gate(F.gelu(ge_gate))
    return net.last(torch.cat([swi, ge, glu * hold.gate(torch.sigmoid(glu_gate))], -1))


@case(gated_units_twin)
def gated_linear_units():
    def forward(net, x):
        swi, swi_gate, ge, ge_gate, rest = net.first(x).split([2, 2, 2, 2, 4], -1)
        parts = [F.silu(swi_gate) * swi, ge * F.gelu(ge_gate), F.glu(rest, -1)]
        return net.last(torch.cat(parts, -1))

    return Net(forward, first=nn.Linear(4, 12), last=nn.Linear(6, 3)), (3, 4)


def response_twin(net, x, hold):
    x = net.first(x)
    lengths = x.norm(dim=(2, 3), keepdim=True)
    ratio = hold.gate(lengths / (lengths.mean(1, keepdim=True) + 0.03))
    return net.last(by_channel(net.gamma) * (x * ratio) + by_channel(net.beta) + x)


@case(response_twin)
def global_response_norm():
    return Net(
        lambda net, x: response_twin(net, x, Hold(False)),
        first=nn.Conv2d(2, 3, 2),
        gamma=parameter(3),
        beta=parameter(3),
        last=nn.Conv2d(3, 2, 2),
    ), (2, 4, 4)


def shared_twin(net, x, hold):
    a, b = net.first(x), net.second(x)
    product = (a * hold.gate(b) + hold.gate(a) * b) / 2
    kernel, bias = net.form.weight, net.form.bias
    form = [
        torch.einsum("...i,oij,...j->...o", first, kernel, second)
        for first, second in ((a, hold.gate(b)), (hold.gate(a), b))
    ]
    gram = (a @ hold.gate(b).mT + hold.gate(a) @ b.mT) / 2
    named = (a @ hold.gate(a).mT + hold.gate(a) @ a.mT) / 2
    return torch.cat([product, a * hold.gate(a), sum(form) / 2 + bias, gram, named], -1)


@case(shared_twin)
def products_of_two_values():
    def forward(net, x):
        a, b = net.first(x), net.second(x)
        named = torch.einsum("nti,nsi->nts", a, a)
        return torch.cat([a * b, a * a, net.form(a, b), a @ b.mT, named], -1)

    parts = {"first": nn.Linear(4, 5), "second": nn.Linear(4, 5), "form": nn.Bilinear(5, 5, 2)}
    return Net(forward, **parts), (3, 4)


def highway_twin(net, x, hold):
    t = hold.gate(torch.sigmoid(net.choice(x)))
    moved = F.relu(net.moved(x))
    return t * moved + (1 - t) * x


@case(highway_twin)
def highway_layer():
    parts = {"choice": nn.Linear(4, 4), "moved": nn.Linear(4, 4)}
    return Net(lambda net, x: highway_twin(net, x, Hold(False)), **parts), (4,)


def quotients_twin(net, x, hold):
    a, b = net.first(x), net.second(x)
    total = b.abs().sum(-1, keepdim=True) + 1
    inverse = total * hold.gate(1 / total.square())
    return torch.cat([a * hold.gate(1 / total), 2 * inverse], -1)


@case(quotients_twin)
def divisions_by_data():
    def forward(net, x):
        total = net.second(x).abs().sum(-1, keepdim=True) + 1
        return torch.cat([net.first(x) / total, 2 / total], -1)

    return Net(forward, first=nn.Linear(4, 3), second=nn.Linear(4, 3)), (4,)


# recurrent cells, written by hand


def tanh_value(hold, u):
    return quotient(hold, u, torch.tanh(u))


def lstm_twin(net, x, hold):
    h = c = None
    for time in range(x.shape[1]):
        total = net.of_input(x[:, time])
        total = total if h is None else total + net.of_state(h)
        i, f, g, o = total.chunk(4, -1)
        new = hold.gate(torch.sigmoid(i)) * tanh_value(hold, g)
        c = new if c is None else hold.gate(torch.sigmoid(f)) * c + new
        h = hold.gate(torch.sigmoid(o)) * tanh_value(hold, c)
    return h


@case(lstm_twin)
def written_out_lstm():
    parts = {"of_input": nn.Linear(3, 12), "of_state": nn.Linear(3, 12)}
    return Net(lambda net, x: lstm_twin(net, x, Hold(False)), **parts), (3, 3)


def gru_twin(net, x, hold):
    h = x[:, 0]
    for time in (1, 2):
        rz = torch.sigmoid(net.gates(torch.cat([x[:, time], h], -1)))
        r, z = hold.gate(rz).chunk(2, -1)
        n = net.of_input(x[:, time]) + r * net.of_state(h)
        n = tanh_value(hold, n)
        h = (1 - z) * n + z * h if time == 1 else n + z * (h - n)
    return h


@case(gru_twin)
def both_forms_of_a_gru():
    parts = {"gates": nn.Linear(6, 6), "of_input": nn.Linear(3, 3), "of_state": nn.Linear(3, 3)}
    return Net(lambda net, x: gru_twin(net, x, Hold(False)), **parts), (3, 3)


# attention


def attention_twin(net, x, hold):
    q, k, v = net.qkv(x).chunk(3, -1)
    scores = q @ k.mT / 2 + net.added
    y = hold.gate(scores.softmax(-1)) @ v
    heads = [t.unflatten(-1, (2, 2)).transpose(1, 2) for t in net.again(y).chunk(3, -1)]
    q, k, v = heads
    scores = (q @ k.mT / math.sqrt(2)).masked_fill(~net.allowed, -torch.inf)
    y = hold.gate(scores.softmax(-1)) @ v
    return net.last(y.transpose(1, 2).flatten(2))


@case(attention_twin)
def attention_with_masks():
    def forward(net, x):
        q, k, v = net.qkv(x).chunk(3, -1)
        y = torch.softmax(q @ k.mT / 2 + net.added, -1) @ v
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in net.again(y).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=net.allowed)
        return net.last(y.transpose(1, 2).flatten(2))

    added = torch.full((3, 3), -torch.inf).triu(1)
    allowed = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1]]).bool()
    layers = {"qkv": nn.Linear(4, 12), "again": nn.Linear(4, 12), "last": nn.Linear(4, 3)}
    return Net(forward, added=added, allowed=allowed, **layers), (3, 4)


def heads_of(x, module, part):
    """One of the three projections of an attention module, ``(N, heads, T, features)``."""
    weight = module.in_proj_weight.chunk(3)[part]
    bias = module.in_proj_bias.chunk(3)[part]
    return (x @ weight.T + bias).unflatten(-1, (2, 2)).transpose(1, 2)


def attention_module_twin(net, x, hold):
    for module in (net.first, net.second):
        q, k, v = (heads_of(x, module, part) for part in range(3))
        scores = q @ k.mT / math.sqrt(2)
        scores = scores.masked_fill(net.hidden, -torch.inf)
        y = (hold.gate(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)
        x = x + module.out_proj(y)
    return x


@case(attention_module_twin)
def attention_modules():
    def forward(net, x):
        x = x + net.first(x, x, x, attn_mask=net.hidden)[0]
        return x + net.second(x, x, x, attn_mask=net.hidden, need_weights=False)[0]

    layers = {n: nn.MultiheadAttention(4, 2, batch_first=True) for n in ("first", "second")}
    return Net(forward, hidden=torch.ones(3, 3).triu(1).bool(), **layers), (3, 4)


def recurrent_modules_twin(net, x, hold):
    states = []
    h = c = torch.zeros(len(x), 2, dtype=x.dtype)
    for time in range(x.shape[1]):
        own = dict(net.lstm.named_parameters())
        total = x[:, time] @ own["weight_ih_l0"].T + own["bias_ih_l0"]
        total = total + h @ own["weight_hh_l0"].T + own["bias_hh_l0"]
        i, f, g, o = total.chunk(4, -1)
        c = hold.gate(torch.sigmoid(f)) * c + hold.gate(torch.sigmoid(i)) * tanh_value(hold, g)
        h = hold.gate(torch.sigmoid(o)) * tanh_value(hold, c)
        states.append(h)
    h = x[:, 0, :2]
    for state in states[1:]:
        of_input, of_state = net.gru.weight_ih @ state.T, net.gru.weight_hh @ h.T
        r, z, n = (of_input.T + net.gru.bias_ih).chunk(3, -1)
        own_r, own_z, own_n = (of_state.T + net.gru.bias_hh).chunk(3, -1)
        n = tanh_value(hold, n + hold.gate(torch.sigmoid(r + own_r)) * own_n)
        z = hold.gate(torch.sigmoid(z + own_z))
        h = (1 - z) * n + z * h
    return h


@case(recurrent_modules_twin)
def recurrent_modules():
    def forward(net, x):
        states = net.lstm(x)[0]
        h = x[:, 0, :2]
        for time in range(1, x.shape[1]):
            h = net.gru(states[:, time], h)
        return h

    return Net(forward, lstm=nn.LSTM(3, 2, batch_first=True), gru=nn.GRUCell(2, 2)), (3, 3)


# the batch elsewhere than first


def windows_twin(net, x, hold):
    q, k, v = net.qkv(x).unflatten(-1, (3, 2, 2)).unbind(3)
    q, k, v = (t.transpose(2, 3) for t in (q, k, v))  # (N, windows, heads, tokens, features)
    y = hold.gate((q @ k.mT / math.sqrt(2) + net.table).softmax(-1)) @ v
    return net.last(y.transpose(2, 3).flatten(3))


@case(windows_twin)
def attention_in_windows():
    def forward(net, x):
        images, windows, tokens, _ = x.shape
        x = x.reshape(images * windows, tokens, 4)  # the batch is merged with the windows
        qkv = net.qkv(x).reshape(-1, tokens, 3, 2, 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q * 2**-0.5 @ k.mT + net.table[None]).softmax(-1)
        x = net.last((weights @ v).transpose(1, 2).reshape(images * windows, tokens, 4))
        return x.view(images, windows, tokens, 3)

    layers = {"qkv": nn.Linear(4, 12), "last": nn.Linear(4, 3)}
    return Net(forward, table=parameter(2, 3, 3), **layers), (2, 3, 4)


def batch_second_twin(net, x, hold):
    q, k, v = (heads_of(x, net.attention, part) for part in range(3))
    y = hold.gate((q @ k.mT / math.sqrt(2)).softmax(-1)) @ v
    return net.attention.out_proj(y.transpose(1, 2).flatten(2))


@case(batch_second_twin)
def attention_with_the_batch_second():
    def forward(net, x):
        x = x.transpose(0, 1)
        return net.attention(x, x, x)[0].transpose(0, 1)

    return Net(forward, attention=nn.MultiheadAttention(4, 2)), (3, 4)


def written_softmax_twin(net, x, hold):
    gate = quotient(hold, net.value(x), torch.sigmoid(net.value(x)), 0.5, "sigmoid")
    return hold.gate(torch.softmax(net.scores(x), -1)) * gate


@case(written_softmax_twin)
def softmax_written_out():
    """The softmax is the gate, though its other factor is a sigmoid."""

    def forward(net, x):
        scores = net.scores(x)
        shares = (scores - scores.amax(-1, keepdim=True)).exp()
        shares = shares / shares.sum(-1, keepdim=True)
        return shares * torch.sigmoid(net.value(x))

    return Net(forward, scores=nn.Linear(4, 4), value=nn.Linear(4, 4)), (4,)
