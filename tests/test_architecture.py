from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from strategies import architectures, names

from archsearch import architecture
from archsearch.architecture import MAX_GROUPS, Amount, Architecture, Cost, schema
from archsearch.errors import ResourceError, SpecError
from archsearch.files import read_yaml

GOOD = textwrap.dedent(
    """\
    format: 1
    key: 279553917aa24062
    model: resnet56
    arguments:
      num_classes: 10
      in_channels: 3
    input_shape: [3, 32, 32]
    widths:
      conv1: {width: 16, size: 16}
      layer1.0.conv1: {width: 7, size: 16}
    cost:
      macs: {value: 62000000, reference: 125485696}
      params: {value: 430000, reference: 853018}
    provenance:
      method: l1_norm
      allocation: global
      target: flops 0.5
      seed: 0
      versions: {archsearch: 0.1.0, torch: 2.14.1}
      command: archsearch find --model resnet56 --flops 0.5
    """
)


def good() -> Architecture:
    return Architecture.create(
        model="resnet56",
        arguments={"num_classes": 10, "in_channels": 3},
        input_shape=(3, 32, 32),
        widths={"conv1": 16, "layer1.0.conv1": 7},
        sizes={"conv1": 16, "layer1.0.conv1": 16},
        cost={
            "macs": {"value": 62_000_000, "reference": 125_485_696},
            "params": {"value": 430_000, "reference": 853_018},
        },
        provenance={
            "method": "l1_norm",
            "allocation": "global",
            "target": "flops 0.5",
            "seed": 0,
            "versions": {"archsearch": "0.1.0", "torch": "2.14.1"},
            "command": "archsearch find --model resnet56 --flops 0.5",
        },
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "arch.yaml"


def refused(path: Path, text: str) -> str:
    """Return the error of reading ``text``, less the name of the file."""
    path.write_text(text)
    start = time.process_time()
    with pytest.raises(SpecError) as caught:
        Architecture.read(path)
    assert time.process_time() - start < 1
    message = str(caught.value)
    assert message.startswith(f"{path}:")
    assert message.isprintable()
    return message.removeprefix(f"{path}:")


# --------------------------------------------------------------------------------------- what is written


def test_the_file_is_small_and_readable(path: Path) -> None:
    good().write(path)
    assert path.read_text() == GOOD


def test_the_file_reads_back_equal(path: Path) -> None:
    path.write_text(GOOD)
    assert Architecture.read(path) == good()


@given(made=architectures())
def test_every_architecture_reads_back_equal_and_writes_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, made: Architecture
) -> None:
    path = tmp_path_factory.getbasetemp() / "arch.yaml"
    made.write(path)
    written = path.read_bytes()
    read = Architecture.read(path)
    assert read == made
    assert repr(read) == repr(made)  # also in types and order
    read.write(path)
    assert path.read_bytes() == written
    assert b"\r" not in written


@given(made=architectures())
def test_the_published_schema_accepts_what_is_written(
    tmp_path_factory: pytest.TempPathFactory, made: Architecture
) -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema())
    path = tmp_path_factory.getbasetemp() / "schema.yaml"
    made.write(path)
    validator.validate(read_yaml(path).data)


def test_the_committed_schema_is_up_to_date() -> None:
    committed = Path(architecture.__file__).with_name("architecture.schema.json")
    assert json.loads(committed.read_text(encoding="utf-8")) == schema()
    pytest.importorskip("jsonschema").Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize(
    "edit",
    [
        ("width: 7", "width: -1"),
        ("width: 7", "width: 7.0e-1"),
        ("width: 7", "breadth: 7"),
        ("[3, 32, 32]", "[]"),
        ("[3, 32, 32]", "[3, 5000, 32]"),
        ("conv1: {", "' conv1': {"),
        ("model: resnet56", "model: ''"),
        ("model: resnet56", "network: resnet56"),
        ("format: 1", "format: 2"),
        ("num_classes: 10", "num classes: 10"),
        ("key: 27", "key: A7"),
    ],
)
def test_the_published_schema_refuses_what_we_refuse(path: Path, edit: tuple[str, str]) -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema())
    refused(path, GOOD.replace(*edit))
    assert not validator.is_valid(read_yaml(path).data)


def test_a_read_only_directory_is_reported_when_writing(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot write"):
        good().write(tmp_path / "none" / "arch.yaml")


def test_the_largest_architecture_fits_the_limits_of_its_file(path: Path) -> None:
    sizes = {f"features.denseblock{i // 100}.denselayer{i}.conv2": 65_536 for i in range(MAX_GROUPS)}
    made = Architecture.create(model="m", input_shape=[3, 224, 224], widths=sizes, sizes=sizes)
    made.write(path)
    assert Architecture.read(path) == made


def test_an_architecture_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        good().model = "other"


# --------------------------------------------------------------------------------------------- the key


def test_the_key_is_the_hash_of_what_decides_the_network() -> None:
    """Spelt out by hand, so that it can never change unnoticed."""
    canonical = (
        '{"arguments":{"in_channels":3,"num_classes":10},"input_shape":[3,32,32],"model":"resnet56",'
        '"widths":{"conv1":16,"layer1.0.conv1":7}}'
    )
    assert good().key == hashlib.sha256(canonical.encode()).hexdigest()[:16] == "279553917aa24062"


def test_cost_provenance_and_order_do_not_change_the_key() -> None:
    other = Architecture.create(
        model="resnet56",
        arguments={"in_channels": 3, "num_classes": 10},
        input_shape=[3, 32, 32],
        widths={"layer1.0.conv1": 7, "conv1": 16},
        sizes={"layer1.0.conv1": 16, "conv1": 16},
    )
    assert other.key == good().key


@pytest.mark.parametrize(
    "edit",
    [
        ("resnet56", "resnet20"),
        ("num_classes: 10", "num_classes: 11"),
        ("32, 32", "32, 33"),
        ("width: 7", "width: 8"),
    ],
)
def test_an_edit_needs_the_key_removed(path: Path, edit: tuple[str, str]) -> None:
    edited = GOOD.replace(*edit)
    message = refused(path, edited)
    assert message.startswith("2: key: does not belong to this content")
    assert "the file was edited; remove the line 'key' to accept the edit" in message
    path.write_text(edited.replace("key: 279553917aa24062\n", ""))
    assert Architecture.read(path).key != good().key


def test_a_key_that_looks_like_a_number_stays_text(path: Path) -> None:
    """One key in 1845 has only decimal digits, and more have one e."""
    for classes in range(8000):
        made = Architecture.create(
            model="m", arguments={"n": classes}, input_shape=[1], widths={"a": 1}, sizes={"a": 1}
        )
        if made.key.isdigit() or made.key.replace("e", "", 1).isdigit():
            made.write(path)
            assert Architecture.read(path) == made
            break
    else:
        pytest.fail("no such key was met")


def test_the_kept_share_is_that_of_the_macs() -> None:
    assert good().keep == 62_000_000 / 125_485_696
    assert good().cost.params == Amount(value=430_000, reference=853_018)
    bare = Architecture.create(model="m", input_shape=[1], widths={}, sizes={}, cost=Cost())
    assert bare.keep is None


# -------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("width: 7,", "width: 17,", "10: widths.layer1.0.conv1: width 17 is more than the size 16 of"),
        ("width: 7,", "width: -1,", "10: widths.layer1.0.conv1.width: must be greater than or equal to 0"),
        ("width: 7,", "width: 70000,", "10: widths.layer1.0.conv1.width: must be less than or equal to"),
        ("width: 7,", "width: 7.0,", "10: widths.layer1.0.conv1.width: must be an integer (got 7.0)"),
        ("width: 7,", "width: '7',", "10: widths.layer1.0.conv1.width: must be an integer (got '7')"),
        ("width: 7,", "width: yes,", "10: widths.layer1.0.conv1.width: must be an integer (got 'yes')"),
        ("width: 7,", "width: true,", "10: widths.layer1.0.conv1.width: must be an integer (got True)"),
        ("width: 7,", "widht: 7,", "10: widths.layer1.0.conv1.widht: unknown field; did you mean width?"),
        ("size: 16}\n  l", "size: 16, keep: 1}\n  l", "9: widths.conv1.keep: unknown field"),
        ("{width: 7, size: 16}", "7", "10: widths.layer1.0.conv1: must be a mapping (got 7)"),
        ("  conv1:", "  'conv1 ':", "9: widths.conv1 : must be printable, without spaces at its ends"),
        ("format: 1", "format: 2", "1: format: is 2, but this version of archsearch reads format 1"),
        ("format: 1", "format: true", "1: format: must be an integer (got True)"),
        ("format: 1\n", "", "1: format: is missing"),
        ("model: resnet56\n", "", "1: model: is missing"),
        ("model:", "modle:", "3: modle: unknown field; did you mean model? (and 1 more)"),
        ("model: resnet56", "model: 56", "3: model: must be a text (got 56)"),
        ("model: resnet56", "model: resnet56\nwidth: {}", "4: width: unknown field; did you mean widths?"),
        ("model: resnet56", 'model: "a\\nb"', "3: model: must be printable, without spaces at its ends"),
        ("model: resnet56", 'model: "a\\u202eb"', "3: model: must be printable"),
        ("model: resnet56", f"model: {'a' * 300}", "3: model: string must have at most 256 characters"),
        ("[3, 32, 32]", "[3, 32, -1]", "7: input_shape.2: must be greater than or equal to 1 (got -1)"),
        ("[3, 32, 32]", "[3, 32, 4097]", "7: input_shape.2: must be less than or equal to 4096"),
        ("[3, 32, 32]", "[]", "7: input_shape: "),
        ("[3, 32, 32]", "[1, 1, 1, 1, 1, 1]", "7: input_shape: "),
        ("[3, 32, 32]", "3", "7: input_shape: must be a list (got 3)"),
        ("num_classes: 10", "num_classes: {a: 1}", "5: arguments.num_classes: must be true, false, null"),
        ("num_classes: 10", "num_classes: [1, a]", "5: arguments.num_classes: a list must hold at most"),
        ("num_classes: 10", f"num_classes: {'a' * 1025}", "5: arguments.num_classes: a text must have at"),
        ("num_classes: 10", "num-classes: 10", "5: arguments.num-classes: must be letters, digits and _"),
        ("value: 62000000", "value: 162000000", "12: cost.macs: value 162000000 is more than the reference"),
        ("value: 62000000", "value: -1", "12: cost.macs.value: must be greater than or equal to 0 (got -1)"),
        ("  macs:", "  mac:", "12: cost.mac: unknown field; did you mean macs?"),
        ("value: 62000000", "valeu: 62000000", "12: cost.macs.valeu: unknown field; did you mean value?"),
        ("seed: 0", "seed: [[[[1]]]]", "14: provenance: must not be nested deeper than 4 levels"),
        ("seed: 0", f"seed: [{'1,' * 2000}]", "14: provenance: must hold at most 1024 values"),
        ("seed: 0", f"seed: {'x' * 1025}", "14: provenance: a text must have at most 1024 characters"),
        ("seed: 0", "seed: .nan", "18: provenance.seed: the number .nan is not finite"),
        ("seed: 0", "seed: !!python/name:os.system x", "18: provenance.seed: the tag "),
        ("  method:", "  ? [a]\n  : 1\n  method:", "15: provenance: a field's name must be a plain word"),
        ("key: 27", "key: 28", "2: key: does not belong to this content"),
        ("key: 279553917aa24062", "key:", "2: key: does not belong to this content"),
        ("model: resnet56", "model: resnet56\nmodel: resnet20", "4: 'model' stands here a second time"),
        (GOOD, "", " is empty"),
        (GOOD, "resnet56", " must hold fields (name: value) at its top"),
        (GOOD, "{}", "1: format: is missing (and 3 more)"),
    ],
)  # fmt: skip
def test_what_breaks_a_rule_is_told_by_line_field_and_reason(
    path: Path, old: str, new: str, message: str
) -> None:
    assert old in GOOD
    assert refused(path, GOOD.replace(old, new)).startswith(message)


def test_too_many_groups_are_refused(path: Path) -> None:
    many = "".join(f"  g{i}: {{width: 1, size: 1}}\n" for i in range(MAX_GROUPS + 1))
    text = GOOD.replace("  conv1: {width: 16, size: 16}\n", many)
    assert "widths: dictionary must have at most 4096 items" in refused(path, text)


def test_a_name_that_says_code_is_only_text(path: Path) -> None:
    """Nothing that a file names is imported."""
    code = """
        import sys
        from archsearch.architecture import Architecture
        read = Architecture.read(sys.argv[1])
        print(read.model, "antigravity" in sys.modules, "torch" in sys.modules)
    """
    good().model_copy(update={"model": "antigravity:main"}).write(path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)],
        env={**os.environ, "PYTHONPATH": str(Path(architecture.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["antigravity:main", "False", "False"]


mutations = st.lists(
    st.tuples(
        st.integers(0, len(GOOD)),
        st.integers(0, 12),
        st.text(max_size=4) | st.sampled_from(
            ["{", "[", "- ", ": ", "\n", "  ", "&a ", "*a", "!!x ", "<<: ", ".nan", "9" * 40, '"']),
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip


@given(changes=mutations)
@example(changes=[(0, len(GOOD), "\x00")])
@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mutated_file_is_read_or_refused_in_one_line(
    path: Path, changes: list[tuple[int, int, str]]
) -> None:
    text = GOOD.replace("key: 279553917aa24062\n", "")
    for start, length, new in changes:
        text = text[:start] + new + text[start + length :]
    path.write_bytes(text.encode(errors="surrogatepass"))
    try:
        Architecture.read(path)
    except SpecError as error:
        assert str(error).startswith(f"{path}:")
        assert str(error).isprintable()


@given(data=st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_make_another_exception(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(SpecError):
        Architecture.read(path)


def base() -> dict[str, Any]:
    return {"model": "m", "input_shape": [3, 8, 8], "widths": {"a": 1}, "sizes": {"a": 2}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": {"a": 3}}, "architecture: widths.a: width 3 is more than the size 2 of the reference"),
        ({"widths": {"b": 1}}, "widths: the group 'a' has a width or a size but not both"),
        ({"widths": {"a": 1.0}}, "architecture: widths.a.width: must be an integer (got 1.0)"),
        ({"arguments": {"x": float("nan")}}, "architecture: arguments.x: a number must be finite"),
        ({"arguments": {"x": 2**63}}, "architecture: arguments.x: an integer must fit into 64 bits"),
        ({"arguments": {"x": object()}}, "architecture: arguments.x: must be true, false, null, a number"),
        ({"arguments": {"x": "\ud800"}}, "architecture: arguments.x: a text must be valid Unicode"),
        ({"model": "\ud800"}, "architecture: model: must be "),
        ({"provenance": {"x": {1, 2}}}, "architecture: provenance: must be true, false, null, a number"),
        ({"provenance": {1: 2}}, "architecture: provenance: the name 1 must be a text"),
        ({"cost": {"flops": 1}}, "architecture: cost.flops: unknown field"),
    ],
)  # fmt: skip
def test_what_a_program_gives_is_checked_too(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        Architecture.create(**{**base(), **change})
    assert str(caught.value).startswith(message)


def test_provenance_that_holds_itself_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    with pytest.raises(SpecError, match="nested deeper than 4 levels"):
        Architecture.create(**base(), provenance=loop)


# ------------------------------------------------------------------------------------------- the groups


def test_groups_of_the_traced_model_fit() -> None:
    good().check_groups({"conv1": 16, "layer1.0.conv1": 16})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"conv1": 16, "layer1.0.conv2": 16},
         "widths.layer1.0.conv1: resnet56 has no such group; did you mean layer1.0.conv2? (and 1 more)"),
        ({"conv1": 16, "layer1.0.conv1": 16, "fc": 8}, "widths.fc: is missing"),
        ({"conv1": 16, "layer1.0.conv1": 32},
         "widths.layer1.0.conv1.size: is 16, but the group of resnet56 has 32"),
        ({}, "widths.conv1: resnet56 has no such group (and 1 more)"),
    ],
)  # fmt: skip
def test_groups_that_do_not_fit_are_told(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        good().check_groups(sizes)
    assert str(caught.value) == message


@given(made=architectures(), extra=names())
def test_groups_fit_exactly_the_sizes_they_were_made_for(made: Architecture, extra: str) -> None:
    sizes = {name: group.size for name, group in made.widths.items()}
    made.check_groups(sizes)
    with pytest.raises(SpecError):
        made.check_groups({**sizes, extra: sizes.get(extra, 0) + 1})
