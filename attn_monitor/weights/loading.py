"""Weights into a model, whatever it is a part of in their file, with a report of what matched and what did not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from attn_monitor.capture.role_names import name_roles, role_of
from attn_monitor.errors import CheckpointError
from attn_monitor.weights.converting import Resize, convert, find_resize, shortened
from attn_monitor.weights.files import Weights, read_weights

WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
CHUNK = re.compile(r"(?<![^.])blocks\.\d+\.(?=\d+\.)")  # DINOv2 trains with blocks.CHUNK.BLOCK
HEAD = re.compile(
    r"(?:[^\d.][^.]*\.)*?"  # no block before it
    r"(?:head|heads|head_dist|classifier|fc|fc_norm|lm_head|last_layer|pooler|pre_logits)\."
)

Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class Fit:
    """The entries of a model that are found below a prefix of names in a file.

    Attributes:
        prefix: what their names begin with in the file.
        weights: the file.
        names: name in the model to name in the file.
        resizes: position embeddings of another size, by name in the model.
        missing: names in the model that the file lacks, or has in another shape.
        notes: on how the weights were renamed.
    """

    prefix: str
    weights: Weights
    names: Mapping[str, str]
    resizes: Mapping[str, Resize]
    missing: Sequence[str]
    notes: Sequence[str] = ()

    @property
    def heads(self) -> list[str]:
        """Missing entries that no attention depends on."""
        return [name for name in self.missing if HEAD.match(name)]

    @property
    def lacking(self) -> list[str]:
        """Missing entries of the backbone."""
        return [name for name in self.missing if not HEAD.match(name)]

    @property
    def rank(self) -> tuple[int, int, int, str]:
        """Sorts fits: fewest missing entries first, then a teacher, as DINO evaluates, before a student."""
        preference = {"teacher": 0, "student": 2}.get(role_of(self.prefix) or "", 1)
        return len(self.lacking), len(self.missing), preference, self.prefix


def load_checkpoint(
    model: nn.Module, path: str, *, key: str | None = None, allow_missing: bool = False, trust: bool = False
) -> str:
    """Fill a model from a file or folder of weights.

    Without a key, the prefix of names below which most entries fit is taken (``teacher.backbone.``, …); among equals a
    teacher before a student, then the first in alphabetical order. Names and shapes are converted by the rules of the
    model's library where needed, and position embeddings of another size are interpolated. Entries of classifiers may
    be missing.

    Args:
        model: any module; its state is changed in place.
        path: the file or folder, see `read_weights`.
        key: a role, such as "student", or a prefix of names in the file ("" for names without one).
        allow_missing: keep the model's values of backbone entries that the file lacks.
        trust: run code that is pickled in the file.

    Returns:
        A report of a few lines: what was loaded, and what was not.

    Raises:
        FileNotFoundError: there is nothing at the path.
        CheckpointError: the file cannot be read, holds code, or does not fit the model.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     torch.save({"student": nn.Linear(3, 4).state_dict()}, f"{folder}/last.pt")
        ...     report = load_checkpoint(nn.Linear(3, 4), f"{folder}/last.pt", key="student")
        >>> report.partition(": ")[2]
        "loaded all 2 entries of the model from below 'student.'"
    """
    stored = _with_plain_names(read_weights(Path(path), trust=trust), model)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    fits = _fits(model, stored, wanted)
    among = fits if key is None else _chosen(fits, key)
    best = min(among, key=lambda fit: fit.rank, default=Fit("", stored, {}, {}, list(wanted)))
    if best.lacking and (among or key is None):
        best = min(best, _converted(model, best, wanted), key=lambda fit: fit.rank)
    if not among and not best.names:
        of = "" if key is None else f"nothing of it lies below key={key!r}; "
        raise CheckpointError(
            f"checkpoint {path}: {of}a {type(model).__name__} was looked for below "
            f"{', '.join(repr(fit.prefix) for fit in fits) or 'every name'} (it has {len(stored.shapes)} entries, and "
            f"needs {next(iter(wanted), 'none')!r})"
        )
    if best.lacking and not (allow_missing and best.names):
        raise CheckpointError(f"checkpoint {path}: {_what_lacks(best, wanted)}")
    _fill(model, path, best)
    as_good = [fit.prefix for fit in among if fit.prefix != best.prefix and fit.rank[:2] == best.rank[:2]]
    return f"{path}: " + "\n  ".join(_report(best, stored, as_good))


def refuse_random(what: str, missing: Sequence[str]) -> None:
    """Raise `CheckpointError` where more than a classifier's entries are missing."""
    if lacking := [name for name in missing if not HEAD.match(name)]:
        raise CheckpointError(f"{what}: {len(lacking)} entries of the model are not in it, such as {lacking[0]!r}")


def _with_plain_names(stored: Weights, model: nn.Module) -> Weights:
    """Remove what torch.compile, FSDP and DINOv2's chunks of blocks put into names."""
    chunked = any(CHUNK.search(name) for name in model.state_dict())

    def plain(name: str) -> str:
        name = WRAPPERS.sub("", name)
        return name if chunked else CHUNK.sub("blocks.", name)

    old = {plain(name): name for name in stored.shapes}

    def load(names: Iterable[str]) -> dict[str, Tensor]:
        new = {old[name]: name for name in names}
        return {new[name]: tensor for name, tensor in stored.load(new).items()}

    return replace(stored, shapes={new: stored.shapes[name] for new, name in old.items()}, load=load)


def _fits(model: nn.Module, stored: Weights, wanted: Shapes) -> list[Fit]:
    """Return a fit for each prefix below which at least half as many of the model's names lie as below any."""
    count = count_prefixes(stored.shapes, wanted)
    most = max(count.values(), default=0)
    return [_fit(model, stored, wanted, prefix) for prefix in sorted(count) if 2 * count[prefix] >= most]


def count_prefixes(names: Iterable[str], wanted: Collection[str]) -> Counter[str]:
    """Count below which prefixes ("" or one that ends in a dot) the wanted names are found among ``names``."""
    count: Counter[str] = Counter()
    deepest = max((name.count(".") for name in wanted), default=0) + 1
    for name in names:
        parts = name.split(".")
        for start in range(max(0, len(parts) - deepest), len(parts)):
            if ".".join(parts[start:]) in wanted:
                count["".join(f"{part}." for part in parts[:start])] += 1
    return count


def _fit(model: nn.Module, stored: Weights, wanted: Shapes, prefix: str) -> Fit:
    names: dict[str, str] = {}
    resizes: dict[str, Resize] = {}
    missing: list[str] = []
    for name, shape in wanted.items():
        found = stored.shapes.get(prefix + name)
        if found is not None and found != shape and (resize := find_resize(model, name, found, shape)) is not None:
            resizes[name] = resize
        elif found != shape:
            missing.append(name)
            continue
        names[name] = prefix + name
    return Fit(prefix, stored, names, resizes, missing)


def _converted(model: nn.Module, fit: Fit, wanted: Shapes) -> Fit:
    below = fit.weights.load(name for name in fit.weights.shapes if name.startswith(fit.prefix))
    converted = convert(model, {name.removeprefix(fit.prefix): tensor for name, tensor in below.items()})
    if converted is None:
        return fit
    found = _fit(model, Weights.of(converted.tensors), wanted, "")
    return replace(found, prefix=fit.prefix, notes=converted.notes)


def _chosen(fits: Sequence[Fit], key: str) -> list[Fit]:
    """Return the fit of exactly this prefix, else those that have the key in their prefix or as their role."""
    key = key.rstrip(".")
    exactly = [fit for fit in fits if fit.prefix.rstrip(".") == key]
    of_role = name_roles([fit.prefix.rstrip(".") for fit in fits]).get(key)
    return exactly or [
        fit
        for fit in fits
        if key and (f".{key}." in f".{fit.prefix}" or role_of(fit.prefix) == key or fit.prefix.rstrip(".") == of_role)
    ]


def _fill(model: nn.Module, path: str, fit: Fit) -> None:
    tensors = fit.weights.load(fit.names.values())
    state = {name: tensors[there] for name, there in fit.names.items()}
    state.update({name: resize(state[name]) for name, resize in fit.resizes.items()})
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # of tensors that cannot be copied, such as sparse ones
        raise CheckpointError(f"checkpoint {path}: {' '.join(str(error).split())}") from error


def _what_lacks(fit: Fit, wanted: Shapes) -> str:
    first = fit.lacking[0]
    found = fit.weights.shapes.get(fit.prefix + first)
    which = "" if found is None else f", of shape {tuple(found)} where {tuple(wanted[first])} is needed"
    return (
        f"{len(fit.lacking)} of {len(wanted)} entries are missing or of another shape, such as {first!r}{which} "
        f"(looked below {fit.prefix!r}). Pass the file's own model, or --allow-missing to leave these at random"
    )


def _report(fit: Fit, stored: Weights, as_good: Sequence[str]) -> list[str]:
    lines = [
        f"loaded {_loaded(fit)} of the model" + (f" from below {fit.prefix!r}" if fit.prefix else ""),
        *fit.notes,
        *(f"interpolated: {name} {resize}" for name, resize in fit.resizes.items()),
    ]
    if fit.heads:
        lines.append(f"the file has no classifier, on which attention does not depend ({shortened(fit.heads)})")
    if fit.lacking:
        lines.append(f"LEFT AT RANDOM, as --allow-missing permits: {shortened(fit.lacking)}")
    used = set(fit.names.values())
    unused = [name for name in stored.shapes if name.startswith(fit.prefix) and name not in used]
    elsewhere = [name for name in stored.shapes if not name.startswith(fit.prefix)]
    if unused and not fit.notes:
        within = _parents([name.removeprefix(fit.prefix) for name in unused])
        lines.append(f"{len(unused)} entries below {fit.prefix!r} have no place in the model ({within})")
    if elsewhere:
        lines.append(f"{len(elsewhere)} entries are left over ({_parents(elsewhere)})")
    if stored.skipped:
        lines.append(f"objects in it that were left out: {shortened(stored.skipped)}")
    if as_good:
        lines.append(f"{', '.join(map(repr, as_good))} would fit too: choose by --key")
    return lines


def _loaded(fit: Fit) -> str:
    total = len(fit.names) + len(fit.missing)
    if not fit.missing:
        return f"all {total} entries"
    return f"{len(fit.names)} of {total} entries" if fit.lacking else f"all {len(fit.names)} entries of the backbone"


def _parents(names: Sequence[str]) -> str:
    """Join the first two parts of names, each once."""
    return shortened(list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names)))
