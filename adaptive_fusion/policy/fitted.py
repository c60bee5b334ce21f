"""What a policy was fitted to: a model, by its fingerprint, and kinds of data. And what differs from the one at hand.

Knows names, shapes and digests as plain values. Must not know how they are taken from a model: `models.fingerprint`
does that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from adaptive_fusion.checks import check_keys, number
from adaptive_fusion.errors import PolicyError

_SHAPES = ("vision", "text")


@dataclass(frozen=True)
class Fingerprint:
    """Which model it is, by what a policy depends on.

    Attributes:
        architecture: Class of the model, such as ``Qwen3VLForConditionalGeneration``.
        vision: Shape of the vision encoder: numbers by name.
        text: Shape of the language model.
        digest: Of sampled weights, hexadecimal: tells fine-tunes of one shape apart. Empty where they cannot be read.
        processor: What the processor does to sizes: ``min_pixels``, ``max_pixels``... Compared, not part of what the
            model is.
        unread: Why there is no digest, in words; not kept in files.
    """

    architecture: str
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    digest: str
    processor: Mapping[str, int] = field(default_factory=dict)
    unread: str = field(default="", compare=False)

    def same_weights(self, other: "Fingerprint") -> bool | None:
        """Whether the digests agree; None where one of them is not known."""
        return self.digest == other.digest if self.digest and other.digest else None

    def is_same(self, other: "Fingerprint") -> bool:
        """Whether it is the same model as far as both say: of this class and shape, and of no other weights."""
        alike = all(getattr(self, part) == getattr(other, part) for part in ("architecture", *_SHAPES))
        return alike and self.same_weights(other) is not False

    def in_words(self) -> str:
        """One line for people."""
        sizes = {part: [str(getattr(self, part).get(key, "?")) for key in ("depth", "width")] for part in _SHAPES}
        parts = [f"{part} {'x'.join(found)}" for part, found in sizes.items()]
        parts.append(f"weights {self.digest[:8]}" if self.digest else self.unread or "weights unknown")
        return f"{self.architecture} ({', '.join(parts)})"

    def to_dict(self) -> dict[str, Any]:
        """TOML-able values."""
        shapes = {name: dict(getattr(self, name)) for name in (*_SHAPES, "processor")}
        return {"architecture": self.architecture, "digest": self.digest, **shapes}

    @classmethod
    def from_dict(cls, values: Any) -> "Fingerprint":
        """Read `to_dict`'s form; raises PolicyError where it is not one."""
        table = check_keys(values, "model", ("architecture", "digest", *_SHAPES), ("processor",))
        for name in ("architecture", "digest"):
            if not isinstance(table[name], str):
                raise PolicyError(f"{name} of model is {table[name]!r}; expected text")
        for name in (*_SHAPES, "processor"):
            if not isinstance(table.get(name, {}), Mapping):
                raise PolicyError(f"{name} of model is {table[name]!r}; expected a table of numbers")
        shapes = {name: dict(table.get(name, {})) for name in (*_SHAPES, "processor")}
        return cls(table["architecture"], shapes["vision"], shapes["text"], table["digest"], shapes["processor"])


class Difference(NamedTuple):
    """One thing in which the model at hand differs from the one fitted to: a ``warning`` or a ``note``, in words.

    `what` is short, `detail` has the values.
    """

    weight: Literal["warning", "note"]
    what: str
    detail: str = ""

    def in_words(self) -> str:
        """All of it."""
        return f"{self.what} ({self.detail})" if self.detail else self.what


@dataclass(frozen=True)
class Fitted:
    """What a policy was fitted to.

    Attributes:
        model: None for a general policy, which holds for no model in particular.
        kinds: Kinds of data, in words.
        features: Lowest and highest value of each feature in that data.
    """

    model: Fingerprint | None = None
    kinds: tuple[str, ...] = ()
    features: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def is_general(self) -> bool:
        """Whether it was fitted to no model in particular."""
        return self.model is None

    def in_words(self) -> str:
        """To which model, and to which kinds of data."""
        model = "no model: general" if self.model is None else self.model.in_words()
        return f"{model}; {', '.join(self.kinds)}" if self.kinds else model

    def fits(self, model: Fingerprint) -> bool:
        """Whether it was fitted to a model of this architecture and shape; weights may be others."""
        return self.model is not None and all(each.weight != "warning" for each in self.differences(model))

    def differences(self, model: Fingerprint) -> tuple[Difference, ...]:
        """In what `model` differs, the gravest first; nothing for a general policy.

        Another architecture or shape is a warning: what was learned need not hold. Other weights of the same shape are
        a note, as are weights that cannot be compared and other limits of the processor.
        """
        own = self.model
        if own is None:
            return ()
        found: list[Difference] = []
        if own.architecture != model.architecture:
            found.append(
                Difference("warning", "another architecture", f"{own.architecture}, here {model.architecture}")
            )
        for part in _SHAPES:
            said, here = getattr(own, part), getattr(model, part)
            other = [f"{k} {said.get(k)}, here {here.get(k)}" for k in {**said, **here} if said.get(k) != here.get(k)]
            if other:
                found.append(Difference("warning", f"another {part} shape", "; ".join(other)))
        if not found and own.same_weights(model) is None:
            found.append(Difference("note", "weights not compared", model.unread or own.unread or "no digest"))
        elif not found and not own.same_weights(model):
            found.append(Difference("note", "other weights of this shape"))
        limits = [
            f"{k} {own.processor[k]}, here {model.processor.get(k)}"
            for k in own.processor
            if own.processor[k] != model.processor.get(k)
        ]
        if limits:
            found.append(Difference("note", "other limits of the processor", "; ".join(limits)))
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """TOML-able values."""
        values: dict[str, Any] = {"kinds": [*self.kinds]}
        if self.features:
            values["features"] = {name: [*ends] for name, ends in self.features.items()}
        if self.model is not None:
            values["model"] = self.model.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Any) -> "Fitted":
        """Read `to_dict`'s form; raises PolicyError where it is not one."""
        table = check_keys(values, "fitted", (), ("kinds", "features", "model"))
        kinds, features = table.get("kinds", []), table.get("features", {})
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise PolicyError(f"kinds of fitted is {kinds!r}; expected a list of names")
        if not isinstance(features, Mapping):
            raise PolicyError(f"features of fitted is {features!r}; expected the lowest and highest of each")
        model = table.get("model")
        return cls(
            None if model is None else Fingerprint.from_dict(model),
            tuple(kinds),
            {str(name): _ends(str(name), ends) for name, ends in features.items()},
        )


def _ends(name: str, ends: Any) -> tuple[float, float]:
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        raise PolicyError(f"{name} of fitted is {ends!r}; expected its lowest and highest value")
    low, high = (number(end, name, error=PolicyError) for end in ends)
    if low > high:
        raise PolicyError(f"{name} of fitted is {ends!r}; expected its lowest and highest value, in that order")
    return low, high
