"""Build the callback from environment variables, for frameworks that hide Lightning's Trainer.

``ATTN_MONITOR=1 command ...`` adds it to any run without code; Lightning finds it by an entry point. Arguments of
`AttentionMapCallback` come from variables, such as ``ATTN_MONITOR_EVERY_N_TRAIN_STEPS=100`` or, of a group,
``ATTN_MONITOR_DRAWING__THRESHOLD=0.5``, and from a YAML file at ``ATTN_MONITOR_CONFIG``; variables take precedence.
"""

from __future__ import annotations

from collections.abc import Mapping

from attn_monitor.callback import AttentionMapCallback
from attn_monitor.extras import needs

with needs("jsonargparse", "reading arguments from the environment"):
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser  # type: ignore[attr-defined]  # is public

PREFIX = "ATTN_MONITOR"


class AttentionMapFromEnvironment(AttentionMapCallback):
    """Act as `AttentionMapCallback`, unless the Trainer already has one."""

    yields = True


def callback_from(environment: Mapping[str, str]) -> AttentionMapCallback:
    """Build the callback from environment variables and the YAML file at ``ATTN_MONITOR_CONFIG``.

    Raises:
        ValueError: A variable names no argument, or a value is invalid.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    names = parser.add_class_arguments(AttentionMapFromEnvironment, None)
    known = {f"{PREFIX}_{name.upper()}" for name in (*names, "config")}
    given = {name: value for name, value in environment.items() if name.startswith(f"{PREFIX}_")}
    if unknown := sorted(name for name in given if name.partition("__")[0] not in known):
        raise ValueError(f"{', '.join(unknown)}: expected one of {', '.join(sorted(known))}")
    words = sorted((name.removeprefix(f"{PREFIX}_").lower().replace("__", "."), value) for name, value in given.items())
    words.sort(key=lambda word: word[0] != "config")  # first, as later words take precedence
    try:
        found = parser.parse_args([f"--{name}={value}" for name, value in words])
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error
    found.pop("config", None)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the name in older versions
    return AttentionMapFromEnvironment(**instantiate(found).as_dict())
