"""The Chomsky hierarchy: which tasks generalise to longer inputs? Deletang et al. 2023 (arXiv 2207.02098), Tab. 2.

    CONFIG=configs/papers/deletang_chomsky.py:reduced
    python -m experiments.sweep run --config=$CONFIG --workdir=runs/chomsky --launcher=local
    python -m experiments.table     --config=$CONFIG --workdir=runs/chomsky
    python -m experiments.lengths   --config=$CONFIG --workdir=runs/chomsky      # accuracy by length

| argument  | runs                                                    | time                               |
|-----------|---------------------------------------------------------|------------------------------------|
| `demo`    | RNN and LSTM, 2 tasks, 1 seed                           | a minute or two on 2 CPU cores     |
| `reduced` | 6 models, 15 tasks, 1 seed, test lengths 41-100         | about an hour on 2 CPU cores       |
| `paper`   | 6 models, 15 tasks, 3 learning rates, 10 seeds each     | some hours a run on one H100       |

`debug` after a preset (`reduced,debug`) shrinks every run to seconds.

Expected: RNN and LSTM solve the regular tasks (first four), the Transformer not; on the others all stay near chance,
but for bucket sort.
"""

import itertools

from ml_collections import ConfigDict

from configs import common

TASKS = {
    "chomsky_even_pairs": "Even pairs",
    "chomsky_modular_arithmetic": "Modular arithmetic (simple)",
    "chomsky_parity_check": "Parity check",
    "chomsky_cycle_navigation": "Cycle navigation",
    "chomsky_stack_manipulation": "Stack manipulation",
    "chomsky_reverse_string": "Reverse string",
    "chomsky_modular_arithmetic_brackets": "Modular arithmetic",
    "chomsky_solve_equation": "Solve equation",
    "chomsky_duplicate_string": "Duplicate string",
    "chomsky_missing_duplicate": "Missing duplicate",
    "chomsky_odds_first": "Odds first",
    "chomsky_binary_addition": "Binary addition",
    "chomsky_binary_multiplication": "Binary multiplication",
    "chomsky_compute_sqrt": "Compute sqrt",
    "chomsky_bucket_sort": "Bucket sort",
}
SLSTM = {"+model.slstm_conv_width": 0, "+model.recurrent_init": "orthogonal", "+model.num_heads": 1}
BLOCKS = {  # 2 blocks of width 64; not in the paper
    "xlstm[0:1]": SLSTM,
    "xlstm[1:0]": {"+model.num_heads": 1},
}
BARE = ("elman", "lstm", "gru")  # one layer

PRESETS = {
    "demo": dict(
        models={"elman": {}, "lstm": {}},
        tasks=("chomsky_parity_check", "chomsky_bucket_sort"),
        seeds=(0,),
        learning_rates=(3e-3,),
        width=64,
        batch_size=32,
        steps=1_000,
        test_lengths=(41, 100),
        num_eval=512,
        seconds=30,
    ),
    "reduced": dict(
        models=dict.fromkeys(BARE, {})
        | {
            name: each | {"model.num_layers": 2, "model.dim": 32, "steps": 500, "optimizer.learning_rate": 1e-2}
            for name, each in (BLOCKS | {"transformer": {"+model.context": 320}}).items()
        },
        tasks=tuple(TASKS),
        seeds=(0,),
        learning_rates=(3e-3,),
        width=64,
        batch_size=32,
        steps=1_500,
        test_lengths=(41, 100),
        num_eval=512,
        seconds=40,
    ),
    "paper": dict(
        models=dict.fromkeys(BARE, {})
        | {name: each | {"model.num_layers": 2, "model.dim": 64} for name, each in BLOCKS.items()}
        | {
            "transformer": {
                "model.num_layers": 5,
                "model.dim": 64,
                "+model.num_heads": 8,
                "+model.context": 1_536,  # all of a sequence: 500 symbols and 1,000 answers
            }
        },
        tasks=tuple(TASKS),
        seeds=tuple(range(10)),
        learning_rates=(1e-4, 3e-4, 5e-4),
        width=256,
        batch_size=128,
        steps=1_000_000,
        test_lengths=(41, 500),
        num_eval=460 * 512,  # 512 sequences a length
        seconds=10_000,
    ),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """One run of the table: the LSTM on the first task; `sweep` changes model, task, learning rate and seed."""
    preset, debug = common.parse_arg(arg, PRESETS)
    numbers = PRESETS[preset]
    config = ConfigDict()
    config.kind = "tagger"
    config.model = dict(backbone="lstm", dim=numbers["width"], num_layers=1, dropout=0.0)
    config.task = dict(name=numbers["tasks"][0], eval_lengths=numbers["test_lengths"], num_eval=numbers["num_eval"])
    config.optimizer = dict(  # Adam, as there is no weight decay
        name="adamw",
        learning_rate=numbers["learning_rates"][0],
        warmup_steps=0,
        schedule="constant",
        weight_decay=0.0,
        betas=(0.9, 0.999),
        clip=1.0,
    )
    config.steps = numbers["steps"]
    config.batch_size = numbers["batch_size"]
    config.seed = 0
    config.eval_every = 0  # at the end
    config.save_every = max(numbers["steps"] // 4, 1)
    config.log_every = 50
    config.eval_batch_size = 128
    config.steps_per_dispatch = 50
    if debug:
        common.shrink(config)
        config.optimizer.warmup_steps, config.task.eval_lengths, config.task.num_eval = 0, (41, 50), 16
    return config.lock()


def sweep(arg: str | None = None):
    """Every run of the table; the seeds of one setting follow each other, so that they share a compiled program."""
    preset, debug = common.parse_arg(arg, PRESETS)
    numbers = PRESETS[preset]
    for task, model, learning_rate, seed in itertools.product(
        numbers["tasks"], numbers["models"], numbers["learning_rates"], numbers["seeds"]
    ):
        own = {name: value for name, value in numbers["models"][model].items() if not debug or name != "steps"}
        rate = {"optimizer.learning_rate": learning_rate} if len(numbers["learning_rates"]) > 1 else {}
        yield {"task.name": task, "model.backbone": model} | own | rate | {"seed": seed}


def expected_seconds(arg: str | None, overrides: dict) -> float:
    """On one of two CPU cores (paper: one H100); the sweep's time left begins from it."""
    preset, debug = common.parse_arg(arg, PRESETS)
    return 10 if debug else PRESETS[preset]["seconds"]


TABLE = dict(
    title="The Chomsky hierarchy: accuracy at lengths beyond the training lengths 1-40, the best run",
    row="model.backbone",
    rows={
        "elman": "RNN (Elman)",
        "lstm": "LSTM",
        "gru": "GRU",
        "xlstm[0:1]": "xLSTM[0:1] (sLSTM)",
        "xlstm[1:0]": "xLSTM[1:0] (mLSTM)",
        "transformer": "Transformer",
    },
    column="task.name",
    columns=TASKS,
    metric="test_accuracy",
    aggregate="max",
    range=(0.0, 1.0),
    digits=3,
    paper=dict(
        name="paper",
        source="Delétang et al. (arXiv 2207.02098), Tab. 2 (numbers as reprinted by later papers): the best of 30 "
        "runs, test lengths 41-500",
        values={
            ("elman", "chomsky_even_pairs"): "≥ 0.900",
            ("elman", "chomsky_modular_arithmetic"): 1.0,
            ("elman", "chomsky_parity_check"): 1.0,
            ("elman", "chomsky_cycle_navigation"): "≥ 0.900",
            ("elman", "chomsky_stack_manipulation"): 0.560,
            ("elman", "chomsky_reverse_string"): 0.620,
            ("elman", "chomsky_duplicate_string"): 0.503,
            ("elman", "chomsky_odds_first"): 0.510,
            ("lstm", "chomsky_even_pairs"): "≥ 0.900",
            ("lstm", "chomsky_modular_arithmetic"): 1.0,
            ("lstm", "chomsky_parity_check"): 1.0,
            ("lstm", "chomsky_cycle_navigation"): "≥ 0.900",
            ("lstm", "chomsky_stack_manipulation"): 0.591,
            ("lstm", "chomsky_reverse_string"): 0.609,
            ("lstm", "chomsky_duplicate_string"): 0.576,
            ("lstm", "chomsky_odds_first"): 0.556,
            ("transformer", "chomsky_even_pairs"): "≥ 0.900",
            ("transformer", "chomsky_modular_arithmetic"): 0.242,
            ("transformer", "chomsky_parity_check"): 0.520,
            ("transformer", "chomsky_cycle_navigation"): 0.619,
            ("transformer", "chomsky_stack_manipulation"): 0.575,
            ("transformer", "chomsky_reverse_string"): 0.623,
            ("transformer", "chomsky_duplicate_string"): 0.528,
            ("transformer", "chomsky_odds_first"): 0.528,
            ("transformer", "chomsky_bucket_sort"): "≥ 0.900",
        },
        missing="no number could be read, or the paper has no such model; ≥ where only 'solved' is known (bucket sort "
        "by the LSTM is 'almost perfect')",
    ),
    protocol={"steps": 1_000_000, "batch_size": 128},
    # memories that this package has no model of
    baselines={
        "Stack-RNN, paper": {
            "chomsky_modular_arithmetic": 1.0,
            "chomsky_parity_check": 1.0,
            "chomsky_stack_manipulation": 1.0,
            "chomsky_reverse_string": 1.0,
            "chomsky_duplicate_string": 0.528,
            "chomsky_odds_first": 0.519,
        },
        "Tape-RNN, paper": {
            "chomsky_modular_arithmetic": 1.0,
            "chomsky_parity_check": 1.0,
            "chomsky_stack_manipulation": 1.0,
            "chomsky_reverse_string": 1.0,
            "chomsky_duplicate_string": 1.0,
            "chomsky_odds_first": 1.0,
        },
    },
    differences="Paper: 1,000,000 steps of batch 128, the best of the learning rates 1e-4, 3e-4 and 5e-4 and 10 seeds "
    "each, RNN and LSTM of one layer and width 256, Transformer of 5 blocks and width 64, not causal, the best of 5 "
    "positional encodings. Here: {config[steps]:,} steps of batch {config[batch_size]} (reduced: blocks 500 at rate "
    "0.01), learning rates {swept[optimizer.learning_rate]}, {config[task][num_eval]:,} test samples of lengths "
    "{config[task][eval_lengths][0]}-{config[task][eval_lengths][1]}, RNN, LSTM and GRU of one layer and width "
    "{config[model][dim]}, a causal Transformer with rotary positions.",
)
