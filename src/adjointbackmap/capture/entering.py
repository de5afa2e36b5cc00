"""Networks that begin after a module: what the model itself takes, and that module's output."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adjointbackmap.capture.copies import structural_copy

Example = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""What a model takes: one tensor, several in order, or several by name."""

# Functions after which the tokens of each row are known: they keep the rows, or choose them.
SAME_ROWS = frozenset(
    "clone detach to float double contiguous add __add__ __radd__ sub __sub__ __rsub__ mul __mul__ "
    "__rmul__ div __truediv__ neg __neg__ requires_grad_".split()
)
CHOSEN_ROWS = "__getitem__"
PARTS = frozenset(("split", "chunk"))
EXPANDED = "expand"
JOINED = frozenset("cat concat concatenate stack".split())


class Embedded(Tensor):
    """The output of a module in place of an image, with what the model took to make it.

    From :meth:`adjointbackmap.Network.embed`. It is a tensor ``(N, T, D)``, accepted wherever an
    image is. Slices of its first dimension, casts, and sums with other tensors keep what the model
    took, such as token numbers and masks; any other result is an ordinary tensor.

    Attributes:
        given: What the model took, each ``(N, ...)``.
    """

    given: tuple[Tensor, ...]

    @staticmethod
    def of(x: Tensor, given: Sequence[Tensor]) -> "Embedded":
        """Join a tensor and what the model took."""
        made = x.detach().as_subclass(Embedded)
        made.given = tuple(given)
        return made

    @property
    def plain(self) -> Tensor:
        """The same numbers as an ordinary tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Apply a function to the numbers, and keep what the model took if the rows are known."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **kwargs)
            name = getattr(func, "__name__", "")
            if name in JOINED:
                return _joined(made, args, kwargs)
            own = next((a for a in args if isinstance(a, Embedded)), None)
            if own is None or not hasattr(own, "given"):
                return _as_plain(made)
            given = _given_after(name, own, args, made)
            if given is None:
                return _as_plain(made)
            if name in PARTS:
                return tuple(Embedded.of(x, g) for x, g in zip(made, given, strict=True))
            return Embedded.of(made, given)


def _given_after(name: str, own: Embedded, args: tuple[Any, ...], made: Any) -> Any:
    """What the model took for the rows of a result; ``None`` if they are not known."""
    if name in SAME_ROWS and made.shape == own.shape:
        return own.given
    rows = len(own.given[0])
    if name == CHOSEN_ROWS and own.dim() and len(own) == rows:
        chosen = args[1]
        if isinstance(chosen, slice | list) or (isinstance(chosen, Tensor) and chosen.dim() == 1):
            return tuple(g[chosen] for g in own.given)
        if type(chosen) is int:  # one sentence, without the dimension of the batch
            return tuple(g[chosen][None] for g in own.given)
    if name == CHOSEN_ROWS and args[1] is None and rows == 1:
        return own.given
    if name in PARTS and len(args) == 2 and len(own) == rows:
        return list(zip(*(getattr(g, name)(args[1]) for g in own.given), strict=True))
    if name == EXPANDED and made.shape == own.shape:
        return own.given
    if name == EXPANDED and rows == 1 and made.dim() == own.dim() and len(own) == 1:
        return tuple(g.expand(len(made), *g.shape[1:]) for g in own.given)
    return None


def _joined(made: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Batches, or rows, put together along the first dimension."""
    parts = args[0] if args else kwargs["tensors"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if dim != 0 or not all(hasattr(part, "given") for part in parts):
        return _as_plain(made)
    given = [torch.cat(rows) for rows in zip(*(part.given for part in parts), strict=True)]
    return Embedded.of(made, given) if len(given[0]) == len(made) else _as_plain(made)


def _as_plain(made: Any) -> Any:
    if isinstance(made, Embedded):
        return made.as_subclass(Tensor)
    if isinstance(made, tuple | list) and any(isinstance(m, Embedded) for m in made):
        return type(made)(_as_plain(m) for m in made)
    return made


def plain(x: Tensor) -> Tensor:
    """A tensor without what the model took."""
    return x.plain if isinstance(x, Embedded) else x


@dataclass(frozen=True)
class Entrance:
    """Where the input of a network enters its model.

    Attributes:
        after: Name of the module whose output is the input of the network.
        names: Names of what the model takes; ``None`` for one in order.
        given: What the model takes for the example, each ``(N, ...)``.
    """

    after: str
    names: tuple[str | None, ...]
    given: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: nn.Module, after: str | nn.Module, example: Example) -> "Entrance":
        """Check the arguments of :func:`adjointbackmap.trace` and join them.

        Raises:
            TypeError: If the example is no tensor, or sequence or mapping of tensors.
            ValueError: If ``after`` is no module of the model, or the tensors have different
                numbers of rows.
        """
        paths = {path: module for path, module in model.named_modules() if path}
        name = after
        if isinstance(after, nn.Module):
            name = next((path for path, module in paths.items() if module is after), "")
        if not isinstance(name, str) or name not in paths:
            shown = type(after).__name__ if isinstance(after, nn.Module) else repr(after)
            msg = f"after must be a module of the model: {', '.join(paths)}. Got {shown}: name one."
            raise ValueError(msg)
        return cls(name, *_named_tensors(example))

    @property
    def example(self) -> Example:
        """What the model takes, as :func:`adjointbackmap.trace` gets it."""
        if None in self.names:
            return self.given
        return {str(name): t for name, t in zip(self.names, self.given, strict=True)}

    def check(self, example: Example) -> tuple[Tensor, ...]:
        """What a model takes, as the entrance has it.

        Raises:
            TypeError: If it is no tensor, or sequence or mapping of tensors.
            ValueError: If it has other names or shapes than the example of the trace.
        """
        names, tensors = _named_tensors(example)
        wanted = [tuple(t.shape[1:]) for t in self.given]
        got = [tuple(t.shape[1:]) for t in tensors]
        if names != self.names or got != wanted:
            msg = (
                f"The input must be as the example of the trace, {_shown(self.names, wanted)}. "
                f"Got {_shown(names, got)}: fill it up to that, or trace the model at its shape."
            )
            raise ValueError(msg)
        return tensors

    def given_for(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the model took for each row of ``x``; that of the example for ordinary tensors.

        Floating numbers have the dtype of ``x``.
        """
        if isinstance(x, Embedded):
            given = x.given
        else:
            given = tuple(t[:1].expand(len(x), *t.shape[1:]) for t in self.given)
        return tuple(t.to(x.dtype) if t.is_floating_point() else t for t in given)

    def run(self, model: nn.Module, x: Tensor, given: Sequence[Tensor] | None = None) -> Any:
        """Call a model with ``x`` as the output of the module.

        Args:
            model: A copy of the model's structure, on which hooks may be registered.
            x: What the module gives, ``(N, ...)``.
            given: What the model takes; by default see :meth:`given_for`.
        """
        taken = self.given_for(x) if given is None else given
        replacement = plain(x)

        def enter(module: nn.Module, inputs: tuple[Any, ...], output: object) -> Tensor:
            return replacement

        handle = model.get_submodule(self.after).register_forward_hook(enter)
        try:
            return self._call(model, taken)
        finally:
            handle.remove()

    def embed(self, model: nn.Module, given: Sequence[Tensor]) -> Embedded:
        """What the module gives in a model, for what the model takes.

        Raises:
            ValueError: If the model does not run, does not call the module once, or the module
                does not give a tensor of floating numbers with a row for each input.
        """
        copied = structural_copy(model)
        found: list[Any] = []

        def keep(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
            found.append(output.clone() if isinstance(output, Tensor) else output)

        copied.get_submodule(self.after).register_forward_hook(keep)
        try:
            with torch.no_grad():
                self._call(copied, given)
        except Exception as error:  # a model may raise anything
            msg = (
                f"The model must run on the example. Got {type(error).__name__}: "
                f"{_first_line(error)}: give what it takes, a tensor, a tuple or a dict."
            )
            raise ValueError(msg) from error
        if len(found) != 1:
            msg = f"after={self.after!r} must be called once. Got {len(found)} calls: name another."
            raise ValueError(msg)
        [x] = found
        floats = isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1
        if not floats or len(x) != len(given[0]):
            msg = (
                f"after={self.after!r} must give a tensor of floating numbers (N, ...). "
                f"Got {_kind_of(x)}: name another module."
            )
            raise ValueError(msg)
        return Embedded.of(x, given)

    def _call(self, model: nn.Module, given: Sequence[Tensor]) -> Any:
        pairs = list(zip(self.names, given, strict=True))
        in_order = [tensor for name, tensor in pairs if name is None]
        return model(*in_order, **{name: tensor for name, tensor in pairs if name is not None})


def run(model: nn.Module, x: Tensor, entrance: Entrance | None) -> Any:
    """Call a copy of a model on ``x``, or with ``x`` as the output of the entrance's module."""
    return model(x) if entrance is None else entrance.run(model, x)


def _named_tensors(example: Example) -> tuple[tuple[str | None, ...], tuple[Tensor, ...]]:
    """Names and tensors of what a model takes.

    Raises:
        TypeError: If it is no tensor, or sequence or mapping of tensors.
        ValueError: If the tensors have different numbers of rows, or none.
    """
    if isinstance(example, Mapping):
        pairs: list[tuple[str | None, Any]] = [(str(name), t) for name, t in example.items()]
    elif isinstance(example, tuple | list):
        pairs = [(None, t) for t in example]
    else:
        pairs = [(None, example)]
    wrong = [type(t).__name__ for _, t in pairs if not isinstance(t, Tensor)]
    if wrong or not pairs:
        msg = (
            "What the model takes must be a tensor, or a tuple or dict of tensors. "
            f"Got {wrong[0] if wrong else 'an empty one'}: give what model(...) gets, such as "
            "token numbers and a mask."
        )
        raise TypeError(msg)
    rows = {t.shape[:1] for _, t in pairs}
    if len(rows) > 1 or not all(t.dim() and len(t) for _, t in pairs):
        shapes = ", ".join(str(tuple(t.shape)) for _, t in pairs)
        msg = f"What the model takes must be (N, ...) with one N. Got {shapes}: give one batch."
        raise ValueError(msg)
    names, tensors = zip(*pairs, strict=True)
    return names, tuple(t.detach() for t in tensors)


def _shown(names: Sequence[str | None], shapes: Sequence[tuple[int, ...]]) -> str:
    """Names and shapes in words."""
    shown = [f"({', '.join(map(str, ('N', *shape)))})" for shape in shapes]
    pairs = zip(names, shown, strict=True)
    return " and ".join(s if name is None else f"{name} {s}" for name, s in pairs)


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), "").removesuffix(".")


def _kind_of(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} of {value.dtype}"
    return type(value).__name__
