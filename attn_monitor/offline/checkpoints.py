"""Fill a model from a file of weights, whatever it is a part of there, and say what matched and what did not."""

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attn_monitor.capture.backbones import role_of
from attn_monitor.errors import CheckpointError
from attn_monitor.offline.weight_files import Weights, read_weights

MOST_PREFIX_TOKENS = 16  # that position embeddings begin with: class, distillation, registers
WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
CHUNK = re.compile(r"(?<![^.])blocks\.\d+\.(?=\d+\.)")  # DINOv2 trains with blocks.CHUNK.BLOCK
HEAD = re.compile(
    r"(?:[^\d.][^.]*\.)*?"  # no block before it
    r"(?:head|heads|head_dist|classifier|fc|fc_norm|lm_head|last_layer|pooler|pre_logits)\."
)


@dataclass(frozen=True)
class Fit:
    """Which of a model's entries are found below a prefix, and how: as they are, or interpolated."""

    prefix: str
    names: Mapping[str, str]
    """Name in the model to name in the file."""
    grids: Mapping[str, Grids]
    missing: Sequence[str]
    """Names in the model that the file lacks, or has in another shape."""

    @property
    def heads(self) -> list[str]:
        """Missing entries that no attention depends on."""
        return [name for name in self.missing if HEAD.match(name)]

    @property
    def lacking(self) -> list[str]:
        """Missing entries of the backbone."""
        return [name for name in self.missing if not HEAD.match(name)]


@dataclass(frozen=True)
class Grids:
    """Position embeddings in a file and in a model: rows and columns of patches, after tokens that have no place."""

    prefix_tokens: int
    old: tuple[int, int]
    new: tuple[int, int]


def load_checkpoint(
    model: nn.Module, path: str, *, key: str | None = None, partial: bool = False, trust: bool = False
) -> str:
    """Fill the model from a file or folder of weights; what was loaded and what was not, in a few lines.

    ``key`` is a role, such as "student", or a prefix of names in the file. Without it, the prefix below which most
    entries fit (``teacher.backbone.``, …); of equals a teacher, as DINO evaluates, before a student, then the first in
    alphabetical order. Position embeddings of another size are interpolated. Entries of classifiers may be missing;
    others only when ``partial`` says so, and keep their values. ``trust`` runs code that is pickled in the file.

    Raises `CheckpointError`.
    """
    stored = _with_plain_names(read_weights(Path(path), trust=trust), model)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    fits = _fits(model, stored, wanted)
    among = [fit for fit in fits if key is None or _lies_below(fit.prefix, key)]
    if not among:
        of = "" if key is None else f"nothing of it lies below key={key!r}; "
        raise CheckpointError(
            f"checkpoint {path}: {of}a {type(model).__name__} was looked for below "
            f"{', '.join(repr(fit.prefix) for fit in fits) or 'every name'} (it has {len(stored.shapes)} entries, and "
            f"needs {next(iter(wanted))!r})"
        )
    best = min(among, key=lambda fit: (len(fit.lacking), len(fit.missing), _preference(fit.prefix), fit.prefix))
    left = [name for name in stored.shapes if name not in set(best.names.values())]
    notes = [_left_over(left, best.prefix)] if left else []
    source = stored
    if best.lacking and (converted := _converted_by_timm(model, stored, best.prefix)) is not None:
        again = _fit(model, converted.weights, wanted, "")
        if len(again.lacking) < len(best.lacking):
            source, notes = converted.weights, converted.notes
            best = Fit(best.prefix, again.names, again.grids, again.missing)
    if best.lacking and not (partial and best.names):
        raise CheckpointError(f"checkpoint {path}: {_what_lacks(best, stored, wanted)}")
    _fill(model, path, best, source)
    loaded = f"all {len(wanted)}" if not best.missing else f"{len(best.names)} of {len(wanted)}"
    notes = [
        f"loaded {loaded} entries of the model from below {best.prefix!r}",
        *(f"interpolated: {n} from {_size(g.old)} to {_size(g.new)} patches" for n, g in best.grids.items()),
        *([f"left at random, as the file has no such classifier: {_shortened(best.heads)}"] if best.heads else []),
        *([f"LEFT AT RANDOM, as asked for: {_shortened(best.lacking)}"] if best.lacking else []),
        *notes,
        *([f"objects in it that were left out: {_shortened(stored.skipped)}"] if stored.skipped else []),
    ]
    as_good = [fit.prefix for fit in fits if fit.prefix != best.prefix and len(fit.missing) <= len(best.missing)]
    if as_good:
        notes.append(f"{', '.join(map(repr, as_good))} would fit too: choose by --key")
    return f"{path}: " + "\n  ".join(notes)


def refuse_random(what: str, missing: Sequence[str]) -> None:
    """Raise `CheckpointError` when more than a classifier's entries are missing."""
    if lacking := [name for name in missing if not HEAD.match(name)]:
        raise CheckpointError(f"{what}: {len(lacking)} entries of the model are not in it, such as {lacking[0]!r}")


def _with_plain_names(stored: Weights, model: nn.Module) -> Weights:
    """Without what torch.compile, FSDP and DINOv2's chunks of blocks put into names."""
    chunked = any(CHUNK.search(name) for name in model.state_dict())

    def plain(name: str) -> str:
        name = WRAPPERS.sub("", name)
        return name if chunked else CHUNK.sub("blocks.", name)

    names = {plain(name): name for name in stored.shapes}
    shapes = {new: stored.shapes[old] for new, old in names.items()}
    return Weights(shapes, lambda name: stored.read(names[name]), stored.skipped)


def _fits(model: nn.Module, stored: Weights, wanted: Mapping[str, torch.Size]) -> list[Fit]:
    """For each prefix below which about as many of the model's names lie as below any."""
    count: Counter[str] = Counter()
    for name in stored.shapes:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in wanted:
                count["".join(f"{part}." for part in parts[:start])] += 1
    most = max(count.values(), default=0)
    return [_fit(model, stored, wanted, prefix) for prefix in sorted(count) if 2 * count[prefix] >= most]


def _fit(model: nn.Module, stored: Weights, wanted: Mapping[str, torch.Size], prefix: str) -> Fit:
    names: dict[str, str] = {}
    grids: dict[str, Grids] = {}
    missing: list[str] = []
    for name, shape in wanted.items():
        found = stored.shapes.get(prefix + name)
        if found is not None and found != shape and (both := _grids(model, name, found, shape)) is not None:
            grids[name] = both
        elif found != shape:
            missing.append(name)
            continue
        names[name] = prefix + name
    return Fit(prefix, names, grids, missing)


def _grids(model: nn.Module, name: str, old: torch.Size, new: torch.Size) -> Grids | None:
    """How position embeddings of another number of tokens, (1, tokens, width) or (tokens, width), are laid out."""
    same_width = old[:-2] + old[-1:] == new[:-2] + new[-1:]
    if not re.search(r"pos(ition(al)?)?_emb", name) or len(old) not in (2, 3) or not same_width:
        return None
    told = (getattr(module, "grid_size", None) for module in model.modules())
    known = next((size for size in told if isinstance(size, tuple) and len(size) == 2), None)
    for prefix_tokens in range(min(old[-2], new[-2], MOST_PREFIX_TOKENS + 1)):
        grids = [_square(tokens - prefix_tokens) for tokens in (old[-2], new[-2])]
        if known is not None and math.prod(known) == new[-2] - prefix_tokens:
            grids[1] = known
        if grids[0] is not None and grids[1] is not None:
            return Grids(prefix_tokens, grids[0], grids[1])
    return None


def _square(patches: int) -> tuple[int, int] | None:
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else None


def _resampled(embeddings: Tensor, grids: Grids) -> Tensor:
    """Bicubic with antialiasing, as timm does; the tokens before the patches are kept."""
    before, patches = embeddings[..., : grids.prefix_tokens, :], embeddings[..., grids.prefix_tokens :, :]
    image = patches.float().reshape(1, *grids.old, -1).permute(0, 3, 1, 2)  # (1, width, rows, columns)
    image = F.interpolate(image, size=grids.new, mode="bicubic", antialias=True)
    patches = image.permute(0, 2, 3, 1).reshape(*embeddings.shape[:-2], -1, embeddings.shape[-1])
    return torch.cat([before, patches.to(before.dtype)], dim=-2)


def _lies_below(prefix: str, key: str) -> bool:
    key = key.rstrip(".")
    return f".{key}." in f".{prefix}" or role_of(prefix) == key


def _preference(prefix: str) -> int:
    return {"teacher": 0, "student": 2}.get(role_of(prefix) or "", 1)


@dataclass(frozen=True)
class _Converted:
    weights: Weights
    notes: list[str]


def _converted_by_timm(model: nn.Module, stored: Weights, prefix: str) -> _Converted | None:
    """By the rules that timm's modules have for files of the model's authors, such as DINOv2's with registers."""
    module = type(model).__module__
    convert = getattr(sys.modules[module], "checkpoint_filter_fn", None) if module.startswith("timm.") else None
    if convert is None:
        return None
    tensors = {n.removeprefix(prefix): stored.read(n) for n in stored.shapes if n.startswith(prefix)}
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):  # where results belong
            converted = convert(dict(tensors), model)
    except Exception:  # of a file that its rules are not for: it is told what lacks without them
        return None
    notes = ["converted by timm's rules for this model"]
    for name, tensor in converted.items():
        if name in tensors and tensors[name].shape != tensor.shape:
            notes.append(f"resampled by timm: {name} from {tuple(tensors[name].shape)} to {tuple(tensor.shape)}")
    if lines := said.getvalue().splitlines():
        notes.append(f"timm says: {lines[0]}" + (f" (and {len(lines) - 1} lines more)" if len(lines) > 1 else ""))
    return _Converted(Weights.of(converted), notes)


def _fill(model: nn.Module, path: str, fit: Fit, source: Weights) -> None:
    state = {name: source.read(there) for name, there in fit.names.items()}
    state.update({name: _resampled(state[name], grids) for name, grids in fit.grids.items()})
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # of tensors that cannot be copied, such as sparse ones
        raise CheckpointError(f"checkpoint {path}: {' '.join(str(error).split())}") from error


def _what_lacks(fit: Fit, stored: Weights, wanted: Mapping[str, torch.Size]) -> str:
    first = fit.lacking[0]
    found = stored.shapes.get(fit.prefix + first)
    which = "" if found is None else f", of shape {tuple(found)} where {tuple(wanted[first])} is needed"
    return (
        f"{len(fit.lacking)} of {len(wanted)} entries are missing or of another shape, such as {first!r}{which} "
        f"(looked below {fit.prefix!r}). Pass the model that the file is of, or --partial true to leave these at random"
    )


def _left_over(names: Sequence[str], prefix: str) -> str:
    """Entries that no model took: below the prefix they tell of another model, elsewhere of other parts."""
    below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    elsewhere = [name for name in names if not name.startswith(prefix)]
    said = [f"{len(elsewhere)} entries are left over ({_parents(elsewhere)})"] if elsewhere else []
    if below:
        said.append(f"{len(below)} entries below {prefix!r} have no place in the model ({_parents(below)})")
    return "; ".join(said)


def _parents(names: Sequence[str]) -> str:
    """The first two parts of names, each once."""
    return _shortened(list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names)))


def _shortened(names: Sequence[str], most: int = 6) -> str:
    return ", ".join([*names[:most]] + ["…"] * (len(names) > most))


def _size(grid: tuple[int, int]) -> str:
    return f"{grid[0]} × {grid[1]}"
