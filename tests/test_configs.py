"""Every config: builds with every argument, is locked, lists its runs; what a sweep may change and what not."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import aggregation, overview, planning
from experiments.build import abstract_model, build_model, build_optimizer, build_task, resolve, step_options
from experiments.table import check as check_table
from experiments.table import places
from tests.small_data import images, music
from xlstm_jax import models, train
from xlstm_jax.data import lookup
from xlstm_jax.data.documents import file_hash
from xlstm_jax.evaluate import split_task

ROOT = Path(__file__).resolve().parents[1]
ARGS = {
    "configs/bible.py": ("", "demo", "reduced", "reduced,lstm", "demo,debug"),
    "configs/scaling.py": ("", "xlstm_7b", "lstm_1b", "xlstm[7:1]_125m,debug", "llama_2.7b,debug", "xlstm_1.3b,debug"),
    "configs/shakespeare.py": ("", "reduced", "reduced,xlstm[1:1]", "demo,debug"),
    "configs/papers/lra.py": ("", "reduced", "paper", "paper,text", "reduced,debug"),
    "configs/papers/mqar.py": ("", "reduced", "paper", "long", "extrapolation", "reduced,debug"),
    "configs/papers/nearest_neighbour.py": ("", "reduced", "paper", "reduced,debug"),
    "configs/papers/odyssey.py": ("", "reduced", "paper", "reduced,debug"),
    "configs/papers/pixels.py": ("", "reduced", "paper", "reduced,mnist", "reduced,debug"),
    "configs/papers/selective_copying.py": ("", "reduced", "paper", "reduced,debug"),
    "configs/papers/tcn_music.py": ("", "reduced", "paper", "reduced,nottingham", "reduced,debug"),
    "configs/papers/tcn_text.py": ("", "reduced", "paper,ptb", "paper,text8", "reduced,debug"),
    "configs/papers/tcn_synthetic.py": ("", "reduced", "paper", "reduced,copy_memory", "reduced,debug"),
    "configs/papers/scaling_laws.py": ("", "reduced", "paper", "reduced,debug"),
    "configs/papers/xlstm_ablations.py": ("", "reduced", "paper", "reduced,debug"),
    "configs/papers/xlstm_gating.py": ("", "reduced", "paper", "reduced,debug"),
    "configs/papers/xlstm_formal_languages.py": ("", "demo", "reduced", "breadth,debug"),
    "configs/papers/deletang_chomsky.py": ("demo", "reduced,debug"),
    "configs/papers/state_tracking.py": ("demo", "reduced,debug"),
}
BIBLE = str(ROOT / "configs/bible.py")
FORMAL = str(ROOT / "configs/papers/xlstm_formal_languages.py")
CHOMSKY = str(ROOT / "configs/papers/deletang_chomsky.py")
STATE = str(ROOT / "configs/papers/state_tracking.py")


def test_every_config_is_listed():
    found = {str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.py") if "def get_config" in p.read_text()}
    assert found == set(ARGS)


@pytest.mark.parametrize("file,arg", [(file, arg) for file, args in ARGS.items() for arg in args])
def test_builds_is_locked_and_lists_distinct_runs(file, arg):
    sweep = planning.load(f"{ROOT / file}:{arg}")
    resolve(sweep.base)
    assert sweep.base.is_locked
    with pytest.raises(AttributeError):
        sweep.base.stepz = 1
    ids = [run.id for run in sweep.runs]
    assert len(set(ids)) == len(ids) > 0
    assert all(sweep.config(run).is_locked for run in sweep.runs)
    if hasattr(sweep.module, "sweep"):
        assert all(sweep.expected_seconds(run) > 0 for run in sweep.runs)
        check_table(sweep)


@pytest.mark.parametrize("file", ARGS)
def test_wrong_argument_names_the_valid_ones(file):
    with pytest.raises(ValueError, match="wanted are one of .*; and debug") as error:
        planning.load(f"{ROOT / file}:dmeo")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "file,counts",
    [
        (FORMAL, {"demo": 6 * 3, "reduced": 6 * 4 * 3, "breadth": 8 * 15 * 2, "paper": 7 * 15 * 3 * 2}),
        (CHOMSKY, {"demo": 2 * 2, "reduced": 6 * 15, "paper": 6 * 15 * 3 * 10}),
        (STATE, {"demo": 2, "reduced": 7 * 4 * 2, "paper": 7 * 6 * 4 * 3}),
    ],
)
def test_sizes_of_the_tables(file, counts):
    for arg, count in counts.items():
        base, module = planning.read(f"{file}:{arg}")
        runs = list(module.sweep(arg))
        assert len(runs) == count == len({planning.run_id(run) for run in runs})
        resolve(planning.override(base, runs[-1]))


def test_paper_preset_is_the_papers_protocol():
    config = planning.load(f"{FORMAL}:paper").base
    assert (config.batch_size, config.steps, config.model.num_layers) == (256, 100_000, 2)
    optimizer = config.optimizer
    assert (optimizer.warmup_steps, optimizer.min_learning_rate, optimizer.weight_decay) == (10_000, 1e-5, 0.1)
    assert optimizer.betas == (0.9, 0.99)


@pytest.mark.parametrize("file", [file for file in ARGS if "papers" in file])
def test_table_numbers_belong_to_its_rows_and_columns(file):
    table = planning.load(str(ROOT / file)).module.TABLE
    assert "protocol" in table or "paper" not in table
    for source in (*([table["paper"]] if "paper" in table else []), *table.get("references", [])):
        assert all(row in table["rows"] and column in table["columns"] for row, column in source["values"])


@pytest.mark.parametrize("file", [file for file in ARGS if "papers" in file])
def test_no_cell_mixes_runs_of_different_tasks(file):
    """A length or a number of pairs belongs to a row or a column: the best of several would be nobody's number."""
    for preset in planning.load(str(ROOT / file)).module.PRESETS:
        sweep = planning.load(f"{ROOT / file}:{preset}")
        config = sweep.base.to_dict()
        runs = [{"id": run.id, "overrides": run.overrides, "config": config} for run in sweep.runs]
        for place, cell in places(sweep.module.TABLE, runs).items():
            mixed = [name for name in aggregation.select_over({}, cell) if name.startswith(("task.", "+task."))]
            assert not mixed, (preset, place)


def test_recall_is_selected_over_the_learning_rates_alone():
    for preset, cells, runs in (("paper", 6 * 3 * 4, 4), ("long", 6 * 9 * 3, 4), ("extrapolation", 6 * 3 * 3, 4)):
        sweep = planning.load(f"{ROOT / 'configs/papers/mqar.py'}:{preset}")
        done = [{"id": run.id, "overrides": run.overrides, "config": sweep.base.to_dict()} for run in sweep.runs]
        found = places(sweep.module.TABLE, done)
        assert len(found) == cells and {len(cell) for cell in found.values()} == {runs}
        assert {*aggregation.select_over(sweep.module.TABLE, done)} == {"optimizer.learning_rate"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder with small files in the place of what the configs name; and the overrides that read them."""
    folder = tmp_path_factory.mktemp("data")
    jsb = lookup.LOCAL["jsb"]
    music(folder / jsb.file)
    images(folder / "fashion_mnist", 28)
    np.save(folder / "tokens.npy", np.arange(5_000, dtype=np.uint16) % 300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLSTM_JAX_DATA", str(folder))
        patch.setitem(lookup.LOCAL, "jsb", jsb._replace(sha256=file_hash(folder / jsb.file)))
        yield {
            "configs/scaling.py": [f"task.corpus=file:{folder / 'tokens.npy'}"],
            "configs/shakespeare.py": ["task.corpus=bundled:kjv"],
        }


@pytest.mark.parametrize("file", ARGS)
def test_is_planned_and_two_steps_of_it_are_done(file, data, tmp_path):
    """Every run is accepted by models, tasks, optimiser and TABLE; two real steps of the first, in one program."""
    sweep = planning.load(f"{ROOT / file}:{ARGS[file][-1]}", data.get(file, []))
    names = planning.validate(sweep)
    if hasattr(sweep.module, "TABLE"):
        check_table(sweep, names)
    found = overview.plan(sweep, tmp_path, together=False, memory=False)
    assert found["states"]["missing"] == len(sweep.runs) and found["programs"] > 0
    plain = resolve(sweep.config(sweep.runs[0]))
    task, tx, options = build_task(plain), build_optimizer(plain), step_options(plain)
    graphdef, _ = abstract_model(plain, task)
    arrays, shell = split_task(task)

    @jax.jit
    def two_steps(seed, arrays):
        task = shell.join(arrays)
        state = train.init_state(build_model(plain, task, seed), task, tx, plain["batch_size"], seed, options)
        fixed = dict(graphdef=graphdef, task=task, tx=tx, batch_size=plain["batch_size"], options=options)
        return jax.lax.scan(lambda state, _: train.train_step(state, **fixed), state, length=2)

    state, rows = two_steps(plain["seed"], arrays)
    assert int(state.step) == 2 and rows.good.all() and np.isfinite(rows.loss).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_overrides_from_the_command_line():
    sweep = planning.load(FORMAL, ["model.dim=32", "optimizer.weight_decay=0", "+model.num_heads=2"])
    config = sweep.config(sweep.runs[-1])
    assert (config.model.dim, config.optimizer.weight_decay, config.model.num_heads) == (32, 0.0, 2)


def test_a_field_that_the_sweep_sets_in_every_run_cannot_be_changed():
    with pytest.raises(ValueError, match="every run of the sweep sets this field itself"):
        planning.load(FORMAL, ["seed=3"])


@pytest.mark.parametrize(
    "override,message",
    [
        ("model.dmi=3", "unknown field 'model.dmi'; nearest: model.dim"),
        ("model.zzz=3", "unknown field 'model.zzz'; nearest: model.dim"),
        ("zzz=3", "unknown field 'zzz'; valid: batch_size, eval_batch_size, eval_every, kind,"),
        ("model.forget_bais=3", "not list 'model.forget_bais': --config.+model.forget_bias=3 adds the option"),
        ("task.train_lengths=3", "--config.+task.train_lengths=3 adds"),
        ("+model=3", "model is a section of the config"),
        (
            "model=3",
            "model is a section of the config: change one of its fields, such as --config.model.backbone=VALUE",
        ),
        ("model.dim=wide", "model.dim='wide' is of type str"),
        ("model.dim=1.5", "is of type float"),
        ("model.dim", "expected --config.model.dim=VALUE"),
    ],
)
def test_wrong_overrides(override, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        planning.load(FORMAL, [override])
    assert "\n" not in str(error.value)


def test_an_option_of_one_row_stays_in_it():
    sweep = planning.load(f"{BIBLE}:reduced")
    found = {run.overrides["label"]: sweep.config(run) for run in sweep.runs}
    assert (found["AWD-LSTM"].task.ar, found["Transformer"].optimizer.learning_rate) == (0.2, 2e-3)
    assert "ar" not in found["LSTM"].task and found["LSTM"].optimizer.learning_rate == 4e-3
    alone = planning.load(f"{BIBLE}:reduced,lstm")
    assert alone.base == found["LSTM"] and [run.overrides["label"] for run in alone.runs] == ["LSTM"]


def test_the_models_of_text_are_of_equal_size():
    """Within 4 % with the 65 characters of tiny Shakespeare, within 7 % with bytes."""
    sweep = planning.load(f"{BIBLE}:reduced")
    for vocabulary, spread in ((65, 1.04), (256, 1.07)):
        sizes = []
        for run in sweep.runs:
            options = sweep.config(run).model.to_dict()
            model = nnx.eval_shape(lambda V=vocabulary, options=options: models.LM(V, rngs=nnx.Rngs(0), **options))
            sizes.append(sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))))
        assert 0.9e6 < min(sizes) and max(sizes) < spread * min(sizes)


def test_a_model_without_a_row_in_the_preset():
    with pytest.raises(ValueError, match="transformer has no row in this preset: lstm, xlstm.1:1. have"):
        planning.load(f"{BIBLE}:demo,transformer")


def test_the_bible_has_no_paper_preset():
    with pytest.raises(ValueError, match="no preset 'paper', as no paper reports this split: take demo or reduced"):
        planning.load(f"{BIBLE}:paper")


def test_the_headline_names_preset_models_tasks_and_folder(tmp_path):
    for arg, words in (("", "preset demo (as none is named"), (":reduced,debug", "preset reduced;")):
        config, module = planning.read(BIBLE + arg)
        line = planning.headline(BIBLE + arg, module, [config], tmp_path)
        assert BIBLE in line and words in line and f"model lstm; task byte_lm; folder {tmp_path}" in line


def test_ids_are_readable_stable_and_follow_the_overrides():
    overrides = {"task.name": "parity", "model.backbone": "xlstm[0:1]", "optimizer.learning_rate": 1e-3, "seed": 1}
    name = planning.run_id(overrides)
    assert name.startswith("parity-xlstm_0_1-learning_rate0.001-seed1-")
    assert planning.run_id(json.loads(json.dumps(overrides))) == name
    assert planning.run_id(overrides | {"+model.num_heads": 2}) != name


def write_config(folder: Path, rows: str) -> str:
    (folder / "c.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg=None): return ConfigDict({'steps': 1, 'model': {'dim': 8}}).lock()\n"
        f"def sweep(arg=None): return {rows}\n"
    )
    return str(folder / "c.py")


def test_sweeps_with_equal_runs_or_unknown_fields_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two runs share the id"):
        planning.load(write_config(tmp_path, "[{'steps': 2}, {'steps': 2}]"))
    for rows, message in (
        ("[{'model.dmi': 2}]", "row {'model.dmi': 2} of the sweep: unknown field 'model.dmi'; nearest: model.dim"),
        ("[{}, {'steps': 1}]", "two runs have the same config: {} and {'steps': 1}"),
        ("[{'+model.bias': __import__('numpy').int64(2)}]", "such as int(x) of a NumPy integer"),
        ("[('steps', 2)]", "sweep() yields ('steps', 2): a dictionary is needed"),
        ("[]", "sweep() yields no run"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            planning.load(write_config(tmp_path, rows))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "no such Python file"),
        ("", "no get_config"),
        ("def get_config(arg=None)\n    return 1\n", "SyntaxError: expected ':' .c.py, line 1."),
        ("\nimport no_such_module\n", "line 2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config(arg=None):\n    return ConfigDict()\n", "line 2: NameError: name 'ConfigDict'"),
        ("def get_config(arg=None):\n    return {}\n", "get_config returns a dict: a ConfigDict is needed"),
    ],
)
def test_a_file_that_is_no_config_is_named_with_its_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "c.py").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        planning.load(str(tmp_path / "c.py"))
    assert "\n" not in str(error.value)
