"""The look-up: every kind of name, splits, and what is missing, empty, damaged or falsely named; no network."""

import json
import lzma
import sys

import numpy as np
import pytest
import scipy.io

from xlstm_jax.data import corpora, documents, lookup, prepared


def refused(message, name, data_dir=None, **options):
    with pytest.raises(ValueError, match=message) as error:
        lookup.load(name, data_dir, **options)
    assert "\n" not in str(error.value)


def lengths(corpus):
    return [len(corpus.splits[split]) for split in ("train", "valid", "test")]


def write_lines(path, count):
    path.write_text("".join(json.dumps({"text": f"line {n}", "body": f"{n}"}) + "\n\n" for n in range(count)))


def test_bundled_text_has_the_splits_of_the_corpus():
    corpus, data = lookup.load("bundled:kjv"), corpora.load("bundled:kjv")
    assert corpus.whole and corpus.hash == corpora.content_hash(data)
    for split, (document,) in corpus.splits.items():
        assert document == corpora.part(data, split).tobytes()


def test_text_is_cut_between_characters(tmp_path):
    text = "aé日本𝄞" * 7
    (tmp_path / "text.txt").write_text(text)
    corpus = lookup.load(f"file:{tmp_path / 'text.txt'}")
    assert "".join(corpus.splits[split][0].decode() for split in ("train", "valid", "test")) == text


def test_json_lines(tmp_path):
    path = tmp_path / "text.jsonl"
    write_lines(path, 40)
    corpus = lookup.load(f"file:{path}")
    assert lengths(corpus) == [36, 2, 2] and not corpus.whole
    assert [corpus.splits["train"][0], *corpus.splits["valid"]] == [b"line 0", b"line 36", b"line 37"]
    assert list(lookup.load(f"file:{path}#body").splits["test"]) == [b"38", b"39"]


def test_token_ids_are_memory_mapped_and_cut_by_position(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(1000, dtype=np.uint16))
    corpus = lookup.load(f"file:{tmp_path / 'ids.npy'}")
    (train,), (test,) = corpus.splits["train"], corpus.splits["test"]
    assert isinstance(train, np.memmap) and (train.size, test[0]) == (900, 950)


@pytest.mark.parametrize("names", [("train", "valid", "test"), ("train", "validation", "test")])
def test_a_folder_of_three_files(tmp_path, names):
    for name in names:
        (tmp_path / f"{name}.txt").write_text(name)
    splits = lookup.load(f"file:{tmp_path}").splits
    assert [splits[split] for split in ("train", "valid", "test")] == [[name.encode()] for name in names]


def test_a_local_file_is_compared_with_its_hash(tmp_path, monkeypatch):
    path = tmp_path / "play.txt"
    path.write_bytes(bytes(range(97, 117)))
    parts = {"train": (0, 90), "valid": (90, 100), "test": (90, 100)}
    known = lookup.Local("play.txt", 20, documents.file_hash(path), path.as_uri(), "a play", parts)
    monkeypatch.setitem(lookup.LOCAL, "play", known)
    assert {s: d[0] for s, d in lookup.load("local:play", tmp_path).splits.items()} == {
        "train": bytes(range(97, 115)),
        "valid": b"st",
        "test": b"st",
    }
    absent = tmp_path / "other"
    refused(
        f"local:play is not there: looked for {absent}/play.txt.*prepare local:play --download", "local:play", absent
    )
    assert lookup.load("local:play", absent, download=True).splits["valid"] == [b"st"]  # from a file: URL
    (absent / "play.txt").write_bytes(b"another")
    refused("play.txt is damaged or another file", "local:play", absent)
    monkeypatch.setitem(lookup.LOCAL, "play", known._replace(sha256="0" * 64, file="new.txt"))
    refused("gave 20 bytes, not the 20 that are recorded", "local:play", absent, download=True)
    assert not (absent / "new.txt").exists()
    monkeypatch.setitem(lookup.LOCAL, "play", known._replace(url=(tmp_path / "none").as_uri(), file="new.txt"))
    refused("was not downloaded from", "local:play", absent, download=True)


def test_piano_rolls(tmp_path):
    rolls = np.empty((1, 2), object)
    rolls[0] = [np.eye(3, 88, dtype=np.uint8), np.zeros((5, 88), np.uint8)]
    content = {f"{split}data": rolls for split in ("train", "valid", "test")}
    scipy.io.savemat(tmp_path / "music.mat", content)
    corpus = lookup.load(f"file:{tmp_path / 'music.mat'}")
    assert [roll.shape for roll in corpus.splits["test"]] == [(3, 88), (5, 88)]
    np.testing.assert_array_equal(corpus.splits["train"][0], np.eye(3, 88))
    scipy.io.savemat(tmp_path / "music.mat", {"traindata": rolls})
    refused("music.mat has no validdata, testdata", f"file:{tmp_path / 'music.mat'}")
    (tmp_path / "music.mat").write_bytes(b"nothing of the kind")
    refused("music.mat is truncated or no MATLAB file", f"file:{tmp_path / 'music.mat'}")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("none.txt", None, "cannot read corpus file .*none.txt: no such file or folder"),
        ("empty.txt", b"", "empty.txt is empty"),
        ("empty.jsonl", b"\n \n", "empty.jsonl is empty"),
        ("short.txt", b"abc", "has 3 bytes: too few for a valid part .90-95 %."),
        ("latin.txt", b"caf\xe9 au lait" * 9, "latin.txt is no UTF-8: byte 0xe9 at offset 3"),
        ("latin.txt.xz", lzma.compress(b"caf\xe9"), "latin.txt.xz is no UTF-8: byte 0xe9 at offset 3"),
        ("cut.npy", b"\x93NUMPY\x01\x00", "cut.npy is truncated or no .npy file"),
        ("plain.npy", b"0 1 2 3", "plain.npy is truncated or no .npy file"),
        ("empty.npy", b"", "empty.npy is truncated or no .npy file"),
        ("few.jsonl", b'{"text": "one"}\n{"text": "two"}\n', "has 2 documents: too few to hold out 2"),
        ("text.txt#title", b"text", "#title names a field: only .jsonl"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, file, content, message):
    if content is not None:
        (tmp_path / file.partition("#")[0]).write_bytes(content)
    refused(message, f"file:{tmp_path / file}")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(9), "holds float64 .9,.: integers .N,. are needed"),
        (np.zeros((3, 3), int), "holds int64 .3, 3."),
        (np.zeros(0, int), "is empty"),
    ],
)
def test_an_array_that_is_no_token_ids(tmp_path, array, message):
    np.save(tmp_path / "ids.npy", array)
    refused(message, f"file:{tmp_path / 'ids.npy'}")


def test_a_truncated_token_file(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(100))
    (tmp_path / "ids.npy").write_bytes((tmp_path / "ids.npy").read_bytes()[:-8])
    refused("ids.npy is truncated or no .npy file", f"file:{tmp_path / 'ids.npy'}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', "line 3 is no JSON"),
        (b'{"text": "\xff"}', "line 3 is no UTF-8: byte 0xff at offset 10"),
        (b'{"title": "x", "body": "y"}', "line 3 has no text 'text' but the fields title, body: .*#FIELD"),
        (b"[1]", "line 3 has no text 'text' but a list"),
    ],
)
def test_a_bad_line_is_numbered(tmp_path, line, message):
    path = tmp_path / "text.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n{"text": "three"}\n')
    with pytest.raises(ValueError, match=message):
        list(documents.JSONLines(path, "text"))


def test_an_empty_split_is_named(tmp_path):
    rolls = np.empty((1, 1), object)
    rolls[0, 0] = np.zeros((5, 88), np.uint8)
    content = {"traindata": rolls, "validdata": np.empty((1, 0), object), "testdata": rolls}
    scipy.io.savemat(tmp_path / "music.mat", content)
    refused("music.mat: its valid split is empty", f"file:{tmp_path / 'music.mat'}")


def test_folders_that_lack_a_file_or_mix_kinds(tmp_path):
    refused("needs one file train.txt, .jsonl or .npy .found: none.", f"file:{tmp_path}")
    for name in ("train.txt", "valid.txt", "test.txt"):
        (tmp_path / name).write_text("text")
    (tmp_path / "dev.txt").write_text("text")
    refused("needs one file valid.txt, .jsonl or .npy .found: dev.txt, valid.txt.", f"file:{tmp_path}")
    (tmp_path / "valid.txt").unlink()
    (tmp_path / "dev.txt").unlink()
    write_lines(tmp_path / "dev.jsonl", 3)
    refused("mixes .jsonl documents with running text", f"file:{tmp_path}")


@pytest.mark.parametrize("name", ["kjv", "bundled", "bundel:kjv", "", "file:", "tfds:"])
def test_an_unknown_kind_names_the_known_ones(name):
    refused("unknown corpus .*bundled:kjv.*; or file:PATH, tfds:NAME", name)


def test_an_unknown_name_names_the_nearest():
    refused("unknown bundled corpus 'kvj'; nearest: kjv", "bundled:kvj")
    refused("unknown local corpus 'shakespeare'; nearest: tinyshakespeare", "local:shakespeare")
    refused("time_limit must be positive, not 0", "bundled:kjv", time_limit=0)


# tensorflow-datasets, without TensorFlow


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Real prepared sets: `notes` (train and test, two versions, two texts), `tiny_shakespeare`, a known name."""
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("prepared")
    tfds.disable_progress_bar()

    class Local(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        splits = ("train", "test")

        def _info(self):
            texts = {key: tfds.features.Text() for key in ("text", "title")}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(texts | {"id": np.int64}))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in self.splits}

        def _generate_examples(self, split):
            for n in range(40 if split == "train" else 5):
                yield n, {"text": f"{split} é {n}", "title": f"{n}", "id": n}

    class Notes(Local, skip_registration=True):
        name = "notes"

    class Newer(Local, skip_registration=True):
        name, VERSION, splits = "notes", tfds.core.Version("1.0.10"), ("train",)

    class Known(Local, skip_registration=True):
        name, splits = "tiny_shakespeare", ("train", "validation", "test")

    for cls in (Notes, Newer, Known):
        cls(file_format="array_record", data_dir=folder).download_and_prepare()
    return folder


def test_a_prepared_set_is_read_without_tensorflow(data_dir):
    corpus = lookup.load("tfds:notes:1.0.0", data_dir)
    assert lengths(corpus) == [38, 2, 5] and not corpus.whole and "tensorflow" not in sys.modules
    texts = {split: {text.decode() for text in found} for split, found in corpus.splits.items()}
    assert texts["train"] | texts["valid"] == {f"train é {n}" for n in range(40)}  # every row once
    assert texts["test"] == {f"test é {n}" for n in range(5)}
    assert lookup.load("tfds:notes:1.0.0#title", data_dir).splits["train"][3].isdigit()
    by_path = lookup.load(f"file:{data_dir / 'notes/1.0.0'}")
    assert list(by_path.splits["test"]) == list(corpus.splits["test"]) and by_path.hash == corpus.hash


def test_the_newest_version_unless_one_is_given(data_dir):
    assert lookup.load("tfds:notes", data_dir).source.endswith("1.0.10")
    assert lengths(lookup.load("tfds:notes", data_dir)) == [36, 2, 2]
    refused("notes:2.0.0 is not prepared", "tfds:notes:2.0.0", data_dir)


def test_a_registered_name_and_mock_data(data_dir):
    import tensorflow_datasets as tfds

    assert lengths(lookup.load("tfds:tiny_shakespeare", data_dir)) == [40, 5, 5]
    with tfds.testing.mock_data(num_examples=7, data_dir=str(data_dir)):
        corpus = lookup.load("tfds:tiny_shakespeare", data_dir)
        assert lengths(corpus) == [7, 7, 7] and isinstance(corpus.splits["valid"][6], bytes)


def test_what_is_wrong_with_a_prepared_set(data_dir, tmp_path):
    refused("unknown text feature of notes 'txt'; nearest: text; write tfds:NAME#FEATURE", "tfds:notes#txt", data_dir)
    folder = tmp_path / "notes/1.0.0"
    folder.mkdir(parents=True)
    for file in (data_dir / "notes/1.0.0").iterdir():
        if "train" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    file = folder / "notes-train.array_record-00000-of-00001"
    whole = (data_dir / "notes/1.0.0" / file.name).read_bytes()
    refused(f"{file.name} is missing: copy or prepare it again", "tfds:notes", tmp_path)
    file.write_bytes(whole[:-700])
    refused(f"{file.name} is damaged: ", "tfds:notes", tmp_path)
    file.write_bytes((data_dir / "notes/1.0.0" / file.name.replace("train", "test")).read_bytes())
    refused(f"{file.name} has 5 rows, not 40", "tfds:notes", tmp_path)
    place = whole.index(b"train")
    file.write_bytes(whole[:place] + b"brain" + whole[place + 5 :])
    with pytest.raises(ValueError, match="tfds:notes: row .* is damaged: .*hash mismatch"):
        list(lookup.load("tfds:notes", tmp_path).splits["train"])
    (folder / "dataset_info.json").write_text("{")
    refused("dataset_info.json is damaged: ", "tfds:notes", tmp_path)
    for stored, why in {"parquet": "loses rows in it silently", "tfrecord": "no random access"}.items():
        (folder / "dataset_info.json").write_text(json.dumps({"fileFormat": stored}))
        refused(f"is stored as {stored}: .*{why}.*file_format='array_record'", "tfds:notes", tmp_path)
    for config in ("en", "de"):
        (tmp_path / f"pages/{config}/1.0.0").mkdir(parents=True)
        (tmp_path / f"pages/{config}/1.0.0/dataset_info.json").write_text("{}")
    refused("prepared with several configs: choose one of tfds:pages/de, tfds:pages/en", "tfds:pages", tmp_path)


def test_what_is_not_prepared_says_how_to_get_it(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    get = f"prepare tfds:lm1b --download --data_dir={tmp_path}"
    refused(
        f"lm1b is not prepared: looked for {tmp_path}/lm1b/.*{get}.*offline instead: file:PATH", "tfds:lm1b", tmp_path
    )
    monkeypatch.setattr(prepared, "find_spec", lambda name: None)
    refused(r"wiki40b/en is not prepared: .*pip install 'xlstm_jax\[tf\]'", "tfds:wiki40b/en", tmp_path)
    refused("unknown name 'lm1c'; nearest: lm1b", "tfds:lm1c", tmp_path)
    monkeypatch.setattr(prepared, "find_spec", lambda name: object())
    refused("lm1c is neither prepared .* nor known .*nearest: lm1b", "tfds:lm1c", tmp_path)


def test_a_download_ends_in_time_and_says_why(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(prepared, "PREPARE", "import time; time.sleep(60)")
    refused("lm1b was not prepared within 0.2 s: no network", "tfds:lm1b", tmp_path, download=True, time_limit=0.2)
    monkeypatch.setattr(prepared, "PREPARE", "raise SystemExit('no route to host')")
    refused("lm1b was not prepared: no route to host", "tfds:lm1b", tmp_path, download=True)
