"""The shape of the code: imports run one way, nothing is written twice, files and functions stay short.

Read with `ast`, nothing is imported. Imports under TYPE_CHECKING count as well; only the lists at the top of entry points
do not (`# noqa: F401`), which name every file for transformers' loader and use none of them.
"""

import ast
import subprocess
import tokenize
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter

import pytest

from conftest import ROOT

FLAT = {path.stem: path for pattern in ("*_kimi.py", "kimi_*.py") for path in ROOT.glob(pattern)}
TRITON = ("kimi_attention_triton", "kimi_int4_triton", "kimi_layer_triton")
# What may be imported, by layer from the bottom up: a file imports from layers below its own.
LAYERS = (
    {"configuration_kimi"},
    {"kimi_int4", "kimi_files", "kimi_machine", "kimi_cpu_source", "kimi_layer_triton"},
    {"kimi_safetensors", "kimi_sizes", "kimi_cpu", "kimi_attention_triton", "kimi_int4_triton"},
    {"kimi_gpu"},
    {"kimi_backends"},
    {"kimi_cache", "kimi_vision", "kimi_experts", "kimi_slots", "kimi_usage"},
    {"kimi_checkpoint", "kimi_pool", "kimi_generation"},
    {"kimi_pretrained"},
    {"modeling_kimi"},
)
TEXT_AND_MEDIA = {
    "image_processing_kimi": {"kimi_media", "kimi_video"},
    "kimi_media": set(),
    "kimi_messages": set(),
    "kimi_output": set(),
    "kimi_schema": set(),
    "kimi_streamer": {"kimi_output"},
    "kimi_tools": set(),
    "kimi_video": {"kimi_media"},
    "processing_kimi": {"kimi_media", "kimi_messages", "kimi_output", "kimi_tools"},
    "tokenization_kimi": {"kimi_messages", "kimi_output", "kimi_schema", "kimi_streamer", "kimi_tools"},
}
KERNELS = ("kimi_cpu", "kimi_cpu_source", "kimi_gpu", *TRITON)
MOST_LINES = {"modeling_kimi.py": 900}
MOST_ROOT_ENTRIES = 59  # 39 of them are what transformers' loader wants flat, code and configs
MOST_STATEMENT_LINES = 60
LINE_LENGTH = 110  # of pyproject.toml
PRAGMAS = ("# fmt:", "# noqa", "# type:")


def imports_of(path):
    """Names of modules, those of this repository without a package."""
    source = path.read_text(encoding="utf-8")
    lines, found = source.splitlines(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module in ("kimi", None):
                names = [alias.name for alias in node.names]
            if any("noqa: F401" in line for line in lines[node.lineno - 1 : node.end_lineno]):
                continue
        else:
            continue
        names = [name.removeprefix("kimi.") for name in names]
        found.update(names, (name.split(".")[0] for name in names))
    return found


IMPORTS = {name: imports_of(path) for name, path in FLAT.items()}
OURS = {name: found & FLAT.keys() for name, found in IMPORTS.items()}


def tracked(pattern="*"):
    done = subprocess.run(
        ["git", "ls-files", "-z", "--", pattern], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    if done.returncode:
        pytest.skip("not a git repository: which files belong to it is not known")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


def code_files():
    """What is run or loaded, without the links in kimi-tiny."""
    outside = ("tests/", "benchmarks/", "examples/", "kimi-tiny/")
    return [ROOT / name for name in tracked("*.py") if not name.startswith(outside)]


def test_every_flat_file_has_a_place_in_the_layers():
    named = set().union(*LAYERS, TEXT_AND_MEDIA)
    assert set(FLAT) == named, "name a new file in LAYERS or TEXT_AND_MEDIA, and forget one that is gone"


def test_imports_make_no_circle():
    try:
        TopologicalSorter(OURS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


@pytest.mark.parametrize("name", sorted(set().union(*LAYERS) & FLAT.keys()))
def test_a_file_imports_from_layers_below_its_own(name):
    level = next(level for level, layer in enumerate(LAYERS) if name in layer)
    assert OURS[name] <= set().union(*LAYERS[:level])


@pytest.mark.parametrize("name", sorted(TEXT_AND_MEDIA))
def test_text_and_media_import_only_what_is_named_here(name):
    assert OURS[name] <= TEXT_AND_MEDIA[name]


@pytest.mark.parametrize(
    ("names", "forbidden"),
    [
        (("kimi_backends",), {"modeling_kimi", "kimi_experts"}),
        (("kimi_usage", "kimi_pool", "kimi_sizes", "kimi_checkpoint"), {"modeling_kimi"}),
        (("kimi_int4", *KERNELS), {"configuration_kimi"}),
        (("kimi_tools", "kimi_output", "kimi_messages", "kimi_schema"), {"torch", "numpy"}),
        (("processing_kimi",), {"tokenization_kimi", "image_processing_kimi"}),
    ],
    ids=["backends", "weights", "kernels", "text", "processing"],
)
def test_what_must_not_be_imported(names, forbidden):
    for name in names:
        assert not IMPORTS[name] & forbidden, name


def test_flat_files_do_not_import_what_people_run():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    for name, found in IMPORTS.items():
        assert not {module.split(".")[0] for module in found} & folders, name


def without_docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def test_no_private_helper_is_written_twice():
    """Two functions of one name with the same statements, whatever their comments, annotations and docstrings."""
    places = defaultdict(list)
    for path in code_files():
        tree = without_docstrings(ast.parse(path.read_text(encoding="utf-8")))
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name != "main":
                body = "\n".join(ast.dump(statement) for statement in node.body)
                places[node.name, body].append(path.relative_to(ROOT).as_posix())
    assert not {name: files for (name, _), files in places.items() if len(files) > 1}


def test_a_constant_has_one_value_wherever_it_is_defined():
    """FEW_ROWS must not be 4 in one file and 16 in another; and no file defines it twice."""
    values, files = defaultdict(set), defaultdict(list)
    for path in code_files():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Name) and target.id.isupper() and getattr(node, "value", None):
                    values[target.id].add(ast.unparse(node.value))
                    files[target.id].append(path.relative_to(ROOT).as_posix())
    assert not {
        name: found for name, found in files.items() if len(values[name]) > 1 or len(found) > len(set(found))
    }


def is_triton_kernel(node):
    return any("triton" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_functions_fit_a_screen():
    """Counted from the first statement to the last: a signature with one parameter a line and the docstring of an entry
    point are lists to look things up in. Triton kernels may be longer, since they cannot be cut without being inlined."""
    long = []
    for path in code_files():
        for node in ast.walk(without_docstrings(ast.parse(path.read_text(encoding="utf-8")))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_triton_kernel(node):
                first, last = node.body[0], node.body[-1]
                if isinstance(first, ast.Pass):
                    continue
                lines = last.end_lineno - first.lineno + 1
                if lines > MOST_STATEMENT_LINES:
                    long.append(
                        f"{path.relative_to(ROOT).as_posix()}:{node.lineno} {node.name}: {lines} lines"
                    )
    assert not long


@pytest.mark.parametrize("name", sorted(MOST_LINES))
def test_a_file_to_be_read_at_one_sitting_stays_short(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= MOST_LINES[name]


def split_by_a_comment(path):
    """Lines that open a bracket around one line that would fit into the same line: the formatter made three lines of one
    because of a comment at the end."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    tokens = list(tokenize.generate_tokens(iter(lines).__next__))
    comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    comments = {line: token for line, token in comments.items() if not token.string.startswith(PRAGMAS)}

    def code(number):
        comment = comments.get(number)
        return lines[number - 1][: comment.start[1] if comment else None].rstrip()

    opened = []
    for token in tokens:
        if token.type == tokenize.OP and token.string in "([{":
            opened.append(token.start[0])
        elif token.type == tokenize.OP and token.string in ")]}":
            first, last = opened.pop(), token.start[0]
            if last != first + 2 or not comments.keys() & {first + 1, last}:
                continue
            begin, inside, end = code(first), code(first + 1).strip(), code(last).strip()
            joined = begin + inside + end
            if inside and inside[-1] != "," and end.startswith(token.string) and len(joined) <= LINE_LENGTH:
                yield first


def test_no_comment_splits_the_line_that_it_is_about():
    """A long comment is on a line of its own, above; at the end the formatter breaks the code instead."""
    assert not [
        f"{name}:{line}"
        for name in tracked("*.py")
        if not name.startswith("kimi-tiny/")
        for line in split_by_a_comment(ROOT / name)
    ]


def test_the_root_can_be_looked_over():
    entries = {name.split("/")[0] for name in tracked()}
    assert len(entries) <= MOST_ROOT_ENTRIES, sorted(entries)
