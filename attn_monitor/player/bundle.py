"""ES modules as one script: a page that is opened from a disk cannot load modules.

Each module becomes a function of its own, after those that it imports, so that its names are its own; what it exports
is an object. Understood are `import {a, b} from "./module.js";` and `export` before a function, a class or one const.
"""

from __future__ import annotations

import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

_IMPORT = re.compile(r'^import \{([\w\s,]*)\} from "\./(\w+)\.js";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async function|function|class|const) (\w+))", re.MULTILINE)


class _Module(NamedTuple):
    imports: dict[str, list[str]]  # names by module
    exports: list[str]
    body: str


def bundle(entry: Path) -> str:
    """The module ``entry`` and all that it imports, in the order of their imports.

    Raises FileNotFoundError for a module that is not there, and ValueError for modules that import each other in a
    cycle, a name that is not exported or exported twice, and an import or export that is not understood.
    """
    modules: dict[str, _Module] = {}
    pending = [entry.stem]
    while pending:
        name = pending.pop()
        if name not in modules:
            modules[name] = _parse(entry.with_stem(name))
            pending += modules[name].imports
    for name, module in modules.items():
        for source, names in module.imports.items():
            if missing := set(names) - set(modules[source].exports):
                raise ValueError(f"{name}.js imports {', '.join(sorted(missing))}, which {source}.js does not export")
    try:
        order = list(TopologicalSorter({name: module.imports for name, module in modules.items()}).static_order())
    except CycleError as error:
        raise ValueError(f"modules import each other in a cycle: {' -> '.join(error.args[1])}") from None
    return "\n".join(_wrapped(name, modules[name]) for name in order)


def _parse(path: Path) -> _Module:
    code = path.read_text(encoding="utf-8")
    imports: dict[str, list[str]] = {}
    for match in _IMPORT.finditer(code):
        imports.setdefault(match[2], []).extend(match[1].replace(",", " ").split())
    exports = _EXPORT.findall(code)
    body = _EXPORT.sub("", _IMPORT.sub("", code))
    if found := re.search(r"^(import|export)\b.*", body, re.MULTILINE):
        raise ValueError(f'{path.name}: expected {{names}} from "./module.js" or one declaration, got: {found[0]}')
    if twice := {name for name in exports if exports.count(name) > 1}:
        raise ValueError(f"{path.name} exports {', '.join(sorted(twice))} twice")
    return _Module(imports, exports, body)


def _wrapped(name: str, module: _Module) -> str:
    imports = [f"const {{ {', '.join(names)} }} = ${source};" for source, names in module.imports.items()]
    exports = f"return {{ {', '.join(module.exports)} }};"
    return "\n".join([f"const ${name} = (() => {{", *imports, module.body.strip(), exports, "})();"])
