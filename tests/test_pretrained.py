"""Published weights: layouts, shards, names, shardings, and what does not fit."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from golden_cases import GOLDEN, load, names
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from xlstm_jax import convert, models
from xlstm_jax.convert.pretrained import aligned

LARGE = dict(vocab_size=11, backbone="xlstm_large", dim=16, num_layers=3, num_heads=2, logit_cap=30.0)
BLOCKS = dict(backbone="xlstm", dim=16, num_layers=3, slstm_at=(1,), mlstm_num_heads=2, slstm_num_heads=4)


def build(seed=0, **arguments):
    kind = models.LM if "vocab_size" in arguments else models.BlockStack
    return kind(**arguments, rngs=nnx.Rngs(seed))


def leaves(model):
    return {key: np.asarray(leaf[...]) for key, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_same(got, want):
    got, want = leaves(got), leaves(want)
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].dtype == want[key].dtype
        np.testing.assert_array_equal(got[key], want[key], err_msg=str(key))


SAVED = {  # arguments, format, layout
    "nxai large": (LARGE, "nxai", "single"),
    "nxai large, fused, bias": (LARGE | dict(use_bias=True, final_norm="rms_bias", qk_factor=0.75), "nxai", "fused"),
    "hf": (LARGE | dict(ffn_width=24, gate_cap=None), "hf", None),
    "hf, tied, fused, no norm": (LARGE | dict(tie_weights=True, final_norm="none"), "hf", "fused"),
    "lm, cuda": (BLOCKS | dict(vocab_size=11), "nxai", "cuda"),
    "lm, tied, bias": (BLOCKS | dict(vocab_size=11, tie_weights=True, use_bias=True, ffn_bias=True), "nxai", "vanilla"),
    "stack": (BLOCKS | dict(slstm_conv_width=0, ffn_width=0, final_norm="none", inner_width=24), "nxai", "cuda"),
    "stack of sLSTM": (BLOCKS | dict(slstm_at=(0, 1, 2), ffn_activation="relu^2"), "nxai", "vanilla"),
}


@pytest.mark.parametrize("name", SAVED)
def test_saved_and_loaded_is_the_same(name, tmp_path):
    arguments, form, layout = SAVED[name]
    model = build(**arguments)
    convert.save_pretrained(model, tmp_path / "model", form, layout=layout)
    loaded, config = convert.load_pretrained(tmp_path / "model")
    assert_same(loaded, model)
    kind = models.LM if "vocab_size" in config else models.BlockStack
    assert nnx.graphdef(nnx.eval_shape(lambda: kind(**config, rngs=nnx.Rngs(0)))) == nnx.graphdef(loaded)


LARGE_LAYOUTS = [(form, layout) for form in ("nxai", "hf") for layout in ("single", "fused")]
BLOCK_LAYOUTS = [("nxai", "vanilla"), ("nxai", "cuda")]
GOLDEN_SAVED = [
    (name, *saved)
    for name in names("xlstm_stack", "xlstm_lm", "xlstm_large", "hf_xlstm")
    for saved in (BLOCK_LAYOUTS if name.startswith(("xlstm_stack", "xlstm_lm")) else LARGE_LAYOUTS)
]


@functools.cache
def golden(name):
    return convert.load_pretrained(GOLDEN / name if name.startswith("hf") else GOLDEN / f"{name}.safetensors")[0]


@pytest.mark.parametrize("name, form, layout", GOLDEN_SAVED)
def test_golden_checkpoints_in_every_layout_that_has_room_for_them(name, form, layout, tmp_path):
    convert.save_pretrained(golden(name), tmp_path / "model", form, layout=layout)
    assert_same(convert.load_pretrained(tmp_path / "model")[0], golden(name))


def test_layouts_are_told_apart(tmp_path):
    """The CUDA layout of the same weights, made from numbers that depend on no backend."""
    name = "xlstm_lm_mixed"
    tensors, a = load_file(GOLDEN / f"{name}.safetensors"), load(name, "float32")
    block = "xlstm_block_stack.blocks.1.xlstm.slstm_cell"
    R, b = a[f"slstm_ext/{block}/recurrent_kernel"], a[f"slstm_ext/{block}/bias"]
    want, _ = convert.load_pretrained(GOLDEN / f"{name}.safetensors")
    cuda = {f"{block}._recurrent_kernel_": R.reshape(*R.shape[:2], -1), f"{block}._bias_": b.reshape(-1)}
    save_file(tensors | cuda, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((GOLDEN / f"{name}.config.json").read_text())
    assert_same(convert.load_pretrained(tmp_path)[0], want)
    convert.save_pretrained(want, tmp_path / "again", "nxai", layout="cuda")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    for key, tensor in (tensors | cuda).items():
        np.testing.assert_array_equal(again[key], tensor, err_msg=key)


def test_shards_in_all_their_forms(tmp_path):
    model = build(**LARGE)
    for form, files in (("hf", "model-00001-of-*.safetensors"), ("nxai", "model_0.safetensors")):
        convert.save_pretrained(model, tmp_path / form, form, shard_bytes=4000)
        assert len(list((tmp_path / form).glob("*.safetensors"))) > 2
        assert len(list((tmp_path / form).glob(files))) == 1
        assert_same(convert.load_pretrained(tmp_path / form)[0], model)


def test_the_long_names_of_q_k_and_v(tmp_path):
    model = build(**LARGE)
    convert.save_pretrained(model, tmp_path, "hf")
    tensors = load_file(tmp_path / "model.safetensors")
    for short, long in zip("qkv", ("query", "key", "value")):
        tensors = {key.replace(f"mlstm_layer.{short}.", f"mlstm_layer.{long}."): x for key, x in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(convert.load_pretrained(tmp_path)[0], model)


def test_into_a_sharding_another_dtype_and_form(tmp_path):
    model = build(**LARGE, param_dtype=jnp.bfloat16)
    convert.save_pretrained(model, tmp_path, "hf")
    assert_same(convert.load_pretrained(tmp_path)[0], model)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def sharding(name, shape):
        return NamedSharding(mesh, PartitionSpec(*(None,) * (len(shape) - 1), "x" if shape[-1] % 8 == 0 else None))

    loaded, _ = convert.load_pretrained(tmp_path, sharding=sharding, param_dtype=jnp.float32, form="recurrent")
    up = loaded.backbone.layers[0].ffn.up.kernel[...]
    assert up.addressable_shards[0].data.shape == (3, 16, 2 * 64 // 8)
    assert loaded.backbone.layers[0].mixer.form == "recurrent"
    for key, leaf in leaves(model).items():
        np.testing.assert_array_equal(leaves(loaded)[key], leaf.astype(np.float32), err_msg=str(key))


def test_weights_are_not_copied_once_more():
    """An aligned host array is taken by a CPU device as it is."""
    array = aligned((300, 5), np.float32)
    assert jnp.asarray(jax.device_put(array)).unsafe_buffer_pointer() == array.ctypes.data


@pytest.fixture
def saved(tmp_path):
    """A folder in Hugging Face's layout."""
    convert.save_pretrained(build(**LARGE), tmp_path / "hf", "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["chunk_size"] == 64  # a number, where ours is None
    return tmp_path / "hf"


def change(folder, tensors=None, **fields):
    """Other tensors (None: gone), other fields."""
    if tensors:
        old = load_file(folder / "model.safetensors")
        new = {key: x for key, x in (old | tensors).items() if x is not None}
        save_file(new, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({key: x for key, x in config.items() if x != "gone"}))


FFN, HEAD = "backbone.blocks.1.ffn.proj_up.weight", "lm_head.weight"
ZEROS = np.zeros((2, 2), np.float32)


def truncate(folder, name="model.safetensors", keep=-9):
    (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def flip_header(folder, name="model.safetensors"):
    """The first bytes after the header's length."""
    content = bytearray((folder / name).read_bytes())
    content[8:24] = bytes(255 - byte for byte in content[8:24])
    (folder / name).write_bytes(content)


def flip_length(folder, name="model.safetensors"):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(bytes(255 - byte for byte in content[:8]) + content[8:])


def two_files(folder):
    save_file({HEAD: ZEROS}, folder / "more.safetensors")


def lost_shard(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "lost.safetensors", "c": "gone.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def only_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


BAD = {
    "all tensors at once": (
        lambda f: change(f, {FFN: None, HEAD: ZEROS, "extra.weight": ZEROS}),
        r"proj_up.weight is missing; extra.weight is unknown; lm_head.weight has the shape \(2, 2\)",
    ),
    "vocabulary": (
        lambda f: change(f, vocab_size=13),
        r"embeddings.weight has the shape \(11, 16\) where vocab_size=13",
    ),
    "tied": (lambda f: change(f, tie_word_embeddings=True), "lm_head.weight differs from backbone.embeddings.weight"),
    "layout": (lambda f: save_file({"a.b": ZEROS}, f / "model.safetensors"), "unknown layout: .* a.b, .*xLSTMLMModel"),
    "truncated": (truncate, "model.safetensors is truncated or not a safetensors file"),
    "empty file": (lambda f: truncate(f, keep=0), "truncated or not a safetensors file"),
    "corrupted header": (flip_header, "model.safetensors is truncated or not a safetensors file"),
    "corrupted length of the header": (flip_length, "model.safetensors is truncated or not a safetensors file"),
    "integers": (lambda f: change(f, {HEAD: np.zeros((2, 2), np.int8)}), "must be floating.* lm_head.weight is I8"),
    "twice": (two_files, "holds lm_head.weight twice"),
    "lost shards": (lost_shard, "lacks gone.safetensors, lost.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no .safetensors file"),
    "pickle": (only_a_pickle, r"only pickles \(pytorch_model.bin\)"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "no configuration beside it: config.json or"),
    "no JSON": (lambda f: truncate(f, "config.json"), "config.json is not JSON"),
    "no fields": (lambda f: (f / "config.json").write_text("[]"), "holds a list, not named fields"),
    "missing field": (lambda f: change(f, num_heads="gone"), "config.json has no num_heads"),
    "no number": (lambda f: change(f, num_heads="two"), "num_heads is 'two', which is no int"),
    "other model": (lambda f: change(f, model_type="llama"), "model_type 'llama'"),
    "heads": (lambda f: change(f, num_heads=3), "num_heads=3 must divide"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_says_what_is_wrong(case, saved):
    spoil, message = BAD[case]
    spoil(saved)
    with pytest.raises(ValueError, match=message) as error:
        convert.load_pretrained(saved)
    assert "\n" not in str(error.value)


def test_bad_checkpoints_of_the_block_stack(tmp_path):
    convert.save_pretrained(build(**BLOCKS | dict(slstm_at=(0, 2))), tmp_path / "stack", "nxai")
    file = tmp_path / "stack" / "model.safetensors"
    tensors = load_file(file)
    kernel = "blocks.2.xlstm.slstm_cell._recurrent_kernel_"
    save_file(tensors | {kernel: np.ascontiguousarray(tensors[kernel].swapaxes(1, 2))}, file)
    with pytest.raises(ValueError, match="which one is meant?"):
        convert.load_pretrained(tmp_path / "stack")
    config = json.loads((file.parent / "config.json").read_text())
    save_file(tensors, file)
    other = config | {"slstm_block": {"slstm": {"function": "lstm"}}}
    (file.parent / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="slstm_block.slstm.function is 'lstm'"):
        convert.load_pretrained(tmp_path / "stack")
    (file.parent / "config.json").write_text(json.dumps(config | {"slstm_at": 2}))
    with pytest.raises(ValueError, match="slstm_at is 2; a list of places"):
        convert.load_pretrained(tmp_path / "stack")
    (file.parent / "config.json").write_text(json.dumps(config | {"slstm_block": None, "mlstm_block": None}))
    with pytest.raises(ValueError, match="neither mlstm_block nor slstm_block"):
        convert.load_pretrained(tmp_path / "stack")
    (file.parent / "config.json").rename(file.parent / "config.yaml")
    (file.parent / "config.yaml").write_text(yaml.safe_dump(config | {"slstm_block": 3}))
    with pytest.raises(ValueError, match="slstm_block is 3, not named fields"):
        convert.load_pretrained(tmp_path / "stack")


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.pkl"])
def test_a_pickle_is_not_opened(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80")
    with pytest.raises(ValueError, match=f"{name} is a pickle"):
        convert.load_pretrained(tmp_path / name)


def test_other_bad_paths(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        convert.load_pretrained(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="notes.txt is no .safetensors file"):
        convert.load_pretrained(tmp_path / "notes.txt")


def test_nothing_is_saved_that_does_not_fit(tmp_path):
    large, blocks = build(**LARGE), build(**BLOCKS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    other = build(**LARGE | dict(backbone="transformer", logit_cap=None, num_layers=1))
    cases = [
        (large, "new", dict(format="torch"), "unknown format 'torch'"),
        (large, "new", dict(layout="double"), "unknown layout 'double'"),
        (large, "new", dict(layout="cuda"), "layout='cuda' is not one of this model's"),
        (large, "full", {}, "nothing is overwritten"),
        (blocks, "new", {}, "format='nxai'"),
        (other, "new", {}, "not blocks of Attention"),
        (build(**LARGE | dict(tie_weights=True)), "new", dict(format="nxai"), "no tied weights"),
        (build(**LARGE | dict(input_gate="sigmoid")), "new", {}, "not 'sigmoid'"),
        (build(**BLOCKS | dict(vocab_size=5, logit_cap=3.0)), "new", dict(format="nxai"), "no cap of the logits"),
        (build(**BLOCKS | dict(final_norm="rms")), "new", dict(format="nxai"), "ends with a layer norm"),
        (build(**LARGE | dict(final_norm="layer")), "new", {}, "ends with an RMS norm"),
        (
            models.Tagger(num_classes=2, **BLOCKS, vocab_size=5, rngs=nnx.Rngs(0)),
            "new",
            {},
            "an LM or a BlockStack can be saved, not a Tagger",
        ),
        (build(backbone="xlstm_large", dim=16, num_layers=1, num_heads=2), "new", {}, "not as a BlockStack"),
    ]
    for model, folder, options, message in cases:
        with pytest.raises(ValueError, match=message):
            convert.save_pretrained(model, tmp_path / folder, **options)
    assert not (tmp_path / "new").exists()
