"""Imports point down, and the library keeps its own rules."""

import ast
import pathlib
import subprocess
import sys

import pytest

import lore_jax

ROOT = pathlib.Path(lore_jax.__file__).parent
LAYERS = (
    {
        "_backend",
        "_processes",
        "_pairs.row_sums",
        "_train.bar",
        "config",
        "hf.texts",
        "io.files",
    },
    {"_checks", "_equations", "hf.table", "hf.text_model", "_solve.interior_point"},
    {"_entry", "_ids", "_tables", "hf.embedding", "prior"},
    {"_posterior.table", "_solve.simplex", "data.votes", "preferences"},
    {
        "_pairs.blocks",
        "_pairs.pack",
        "_pairs.used_rows",
        "_posterior.moments",
        "_posterior.sums",
        "_solve.stored",
        "data.simulate",
        "data.splits",
        "hf.datasets",
    },
    {"_pairs.distributed", "model"},
    {
        "_mesh",
        "_pairs.projected",
        "_pairs.rows",
        "_train.coordinates",
        "choosing",
        "data.bowling_green",
        "evaluation",
        "hf.export",
        "losses",
        "results",
    },
    {
        "_train.starts",
        "_train.steps",
        "adaptation",
        "data",
        "diagnostics",
        "heads",
        "streaming",
    },
    {
        "_train.marginal",
        "_train.published",
        "_train.resume",
        "comparison",
        "io.records",
        "io.tree",
        "prediction",
    },
    {"_train.trainer", "_train.validation", "acquisition", "io.user_files"},
    {"_train.refinement", "_train.search", "io.checkpoint"},
    {"_train.recipe", "store"},
    {"fitting"},
    {"__init__"},
    {
        "cli.arrays",
        "cli.figures",
        "cli.intervals",
        "cli.output",
        "cli.table_files",
    },
    {"cli.quickstart", "cli.tables"},
    {"cli.inputs", "cli.users"},
    {"cli.options"},
    {"cli.commands", "cli.text_commands"},
    {"cli.app"},
    {"cli.main"},
    {"cli.__main__"},
)
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if path.name != "__init__.py" or path.parent.name in ("lore_jax", "data")
)


def label(path):
    """`lore_jax/_train/search.py` → "_train.search"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts)


TOUCH_FILES = {
    "data.bowling_green",
    "hf.export",
    "hf.table",
    "io.checkpoint",
    "io.files",
    "io.user_files",
    "store",
}
FILE_CALLS = {
    *("open", "read_text", "write_text", "read_bytes", "write_bytes", "unlink"),
    *("save", "savez", "load", "memmap", "tofile", "fromfile", "mkdir", "safe_open"),
    *("mkstemp", "replace_file", "save_file", "load_file"),
}
FILE_MODULES = {
    *("os", "io", "pathlib", "shutil", "tempfile", "safetensors", "csv", "pickle"),
    "importlib.resources",
}


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path):
    """Every absolute module name that the file imports, wherever it does."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} uses a relative import"
            yield node.module
            if node.module == "lore_jax":
                yield from (f"lore_jax.{alias.name}" for alias in node.names)
            elif node.module.startswith("lore_jax."):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def called(path):
    """Names of everything that is called, the last part of a dotted name."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            function = node.func
            yield getattr(function, "attr", getattr(function, "id", None)), node


def own(name):
    """`lore_jax._solve.simplex` → "_solve.simplex"."""
    return name.removeprefix("lore_jax.") if name.startswith("lore_jax.") else None


by_module = pytest.mark.parametrize("path", MODULES, ids=label)


def test_every_module_has_a_layer_and_every_layer_its_modules():
    assert {label(path) for path in MODULES} == set(LAYER)


@by_module
def test_imports_point_down(path):
    below = {
        target
        for target in map(own, imported(path))
        if target in LAYER and LAYER[target] >= LAYER[label(path)]
    }
    assert not below, f"{label(path)} imports {below}, which is not below it"


@by_module
def test_only_the_package_itself_is_imported_from(path):
    allowed = {"jax", "flax", "optax", "numpy", "lore_jax"}
    if label(path) == "io.files":
        allowed.add("safetensors")
    if label(path).startswith("hf."):  # Inside functions, for who has them.
        allowed |= {"torch", "transformers", "safetensors", "sentence_transformers"}
    if label(path) == "diagnostics":  # Inside `plot`, for who has it.
        allowed.add("matplotlib")
    if label(path) == "_train.bar":  # Inside `Bar`, for who has it.
        allowed.add("tqdm")
    if label(path).startswith("cli."):  # Of an extra, and above `lore_jax` itself.
        allowed |= {"matplotlib", "ml_dtypes", "pyarrow", "safetensors", "tqdm"}
        allowed.add("typer")
    for name in imported(path):
        top = name.split(".")[0]
        assert top in allowed or top in sys.stdlib_module_names, name
        assert top not in {"argparse", "optparse", "click"}


@by_module
def test_no_module_is_two_modules(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


@by_module
def test_the_library_never_prints_asserts_or_configures_jax(path):
    for name, node in called(path):
        assert name not in {"print", "breakpoint", "exit", "input"}, node.lineno
        source = ast.unparse(node.func)
        assert source != "jax.config.update", node.lineno
        assert source != "jax.debug.print", node.lineno
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Assert), node.lineno
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets = getattr(node, "targets", None) or [node.target]
            assert not any("jax.config" in ast.unparse(t) for t in targets)


@by_module
def test_files_are_touched_only_where_they_may_be(path):
    if label(path) in TOUCH_FILES or label(path).startswith("cli."):
        return
    assert not FILE_MODULES & set(imported(path))
    for name, node in called(path):
        assert name not in FILE_CALLS, f"{ast.unparse(node.func)}, {node.lineno}"


@by_module
def test_public_names_are_documented(path):
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if not node.name.startswith("_"):
                assert ast.get_docstring(node), node.name


def test_the_public_surface():
    promised = (
        "RewardModel RewardParams Prior Preferences Fitted Adapted Posterior Progress "
        "UserStates UserStore ArraySource FeatureSource fit fit_prior adapt "
        "adapt_users posterior predict_proba margins score score_rows top_k best_of_n "
        "jury align compare warm_up "
        "project reward reward_from_weights mixture_weights init_params uniform_prior "
        "Marginal Search PriorSearch PublishedJoint PublishedAlternating "
        "PosteriorMean MaximumLikelihood MAP PublishedAdam "
        "accuracy log_loss bradley_terry_loss best_pairs score_pairs "
        "take_users take_pairs take_shots store_as "
        "save load save_progress load_progress save_users load_users "
        "acquisition data diagnostics evaluation losses prediction streaming"
    )
    exported = {
        alias.asname
        for node in tree(ROOT / "__init__.py").body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert exported == set(promised.split())


def test_importing_sets_no_flag_and_starts_no_device():
    """In a fresh process: nothing printed, no backend, JAX's settings untouched."""
    code = (
        "import jax; before = dict(jax.config.values); import lore_jax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "after = dict(jax.config.values)\n"
        "assert all(after[name] == value for name, value in before.items())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT.parent,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
