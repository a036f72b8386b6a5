"""Puts this repository's code, configs and chat template beside weights downloaded from the Hub.

    python -m scripts.adopt FOLDER               a dry run: what would change, field by field
    python -m scripts.adopt FOLDER --write       does it; replaced files are kept in FOLDER/before_adopt
    python -m scripts.adopt FOLDER --write --links      links to this clone instead of copies of the code
    python -m scripts.adopt FOLDER --undo        restores what was there before, byte for byte

    code                      copied or linked; a file of the same name is replaced
    chat_template.jinja       the same
    config.json               the folder's own: its values describe its weights. auto_map, architectures and what the
                              code cannot do without are set
    generation_config.json, preprocessor_config.json, tokenizer_config.json
                              the folder's own values, with auto_map set and missing fields added
    processor_config.json     only if there is one, since transformers reads its auto_map first
    weights, their index, tiktoken.model      only read
    all else                  left alone. The published code has other file names, which auto_map no longer names;
                              some engines import them by name

The folder is checked as it would be afterwards (scripts.check), and refused if a check fails: then nothing is
written.

Each file is replaced in one step, and a manifest of all of them is written first. So an interrupted run leaves every
file either old or new; the same command completes it and --undo reverts it. Links are replaced, never written
through: a snapshot in the Hub's cache links to blobs that other snapshots share.

Exit status: 0 done, or nothing to do; 1 the folder fails a check; 2 refused for another reason, which is printed.
"""

import argparse
import copy
import hashlib
import json
import os
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kimi.tokenization_kimi import NUM_RESERVED

from .check import Finding, check_folder, read_json
from .tiny_checkpoint import ROOT, config_for_vocabulary, files_beside_weights, json_text

BACKUP = "before_adopt"
MANIFEST = "manifest.json"
PART = ".part"  # a file that is being written
SHOWN_CHARACTERS = 160  # characters of a value
LOAD = """\
from transformers import AutoModelForCausalLM, AutoProcessor
folder = {folder!r}
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, device_map="auto")"""


class State(NamedTuple):
    """What is stored under a name: kind "absent", "file" with its SHA-256, or "link" with its text."""

    kind: str
    value: str = ""


ABSENT = State("absent")


def state_of(path: Path) -> State:
    if path.is_symlink():
        return State("link", os.readlink(path))
    if not path.exists():
        return ABSENT
    if not path.is_file():
        raise ValueError(f"{path} is not a file, but this repository has a file of that name. Move it away.")
    return file_state(path.read_bytes())


def file_state(content: bytes) -> State:
    return State("file", hashlib.sha256(content).hexdigest())


@dataclass
class Change:
    """One file: what is there, what will be, and the bytes of that unless it is a link. `lines` tell what differs."""

    name: str
    before: State
    after: State
    content: bytes = b""
    lines: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------- configs


def merge_config(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The folder's config.json for this repository's code. `ours` has its token ids moved to the folder's vocabulary."""
    merged = copy.deepcopy(theirs)
    merged["auto_map"], merged["architectures"] = ours["auto_map"], ours["architectures"]
    # Where they are missing, transformers 5 ties the embeddings and the placeholder is the published one.
    for name in ("tie_word_embeddings", "media_placeholder_token_id"):
        merged.setdefault(name, ours[name])
    for name in ("text_config", "vision_config"):
        if isinstance(merged.get(name), dict):
            merged[name].pop("auto_map", None)  # names files of the published code
    parts: list[dict[str, Any]] = [merged, merged["text_config"]]
    for part in parts:
        if ours["eos_token_id"] not in as_list(part.get("eos_token_id")):
            part["eos_token_id"] = ours["eos_token_id"]
    return merged


def merge_generation(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    merged, end = {**ours, **theirs}, ours["eos_token_id"][0]
    if end not in (ids := as_list(merged["eos_token_id"])):
        merged["eos_token_id"] = [end, *ids]
    return merged


def merge_preprocessor(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    settings = {**ours["media_proc_cfg"], **(theirs.get("media_proc_cfg") or {})}
    return {**ours, **theirs, "auto_map": ours["auto_map"], "media_proc_cfg": settings}


def merge_tokenizer(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    merged = {**ours, **theirs, "auto_map": ours["auto_map"], "tokenizer_class": ours["tokenizer_class"]}
    merged.pop("chat_template", None)  # chat_template.jinja is the one that is read
    return merged


def merge_processor(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """`ours` is preprocessor_config.json. transformers 5 may nest other settings here, with an auto_map of their own."""
    auto_map = ours["auto_map"]
    merged = {**copy.deepcopy(theirs), "auto_map": {"AutoProcessor": auto_map["AutoProcessor"]}}
    nested = theirs.get("image_processor")
    if isinstance(nested, dict) and "auto_map" in nested:
        merged["image_processor"]["auto_map"] = {"AutoImageProcessor": auto_map["AutoImageProcessor"]}
    return merged


MERGES = {
    "config.json": merge_config,
    "generation_config.json": merge_generation,
    "preprocessor_config.json": merge_preprocessor,
    "tokenizer_config.json": merge_tokenizer,
    "processor_config.json": merge_processor,
}


def as_list(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def config_changes(folder: Path) -> Iterator[Change]:
    """The files that are merged, with a line for each field that changes, is added, or differs and is kept."""
    config = read_json(folder, "config.json")
    if config.get("model_type") != "kimi_k25":
        raise ValueError(
            f"{folder}/config.json has model_type {config.get('model_type')!r}; this code is for 'kimi_k25'."
        )
    text = config.get("text_config")
    vocab_size = text.get("vocab_size") if isinstance(text, dict) else None
    if not isinstance(vocab_size, int):
        raise ValueError(
            f"{folder}/config.json has no text_config.vocab_size, which the token ids depend on."
        )
    for name, merge in MERGES.items():
        path = folder / name
        there = path.is_file()
        if name == "processor_config.json" and not there:
            continue
        theirs = read_json(folder, name) if there else {}
        source = "preprocessor_config.json" if name == "processor_config.json" else name
        ours = config_for_vocabulary(source, vocab_size - NUM_RESERVED)
        merged = merge(theirs, ours)
        lines = [f"{at}: {shown(old)} -> {shown(new)}" for at, old, new in differences(theirs, merged)]
        kept = kept_lines(merged, ours) if source == name else []
        before, content = state_of(path), json_text(merged).encode()
        if not there:
            yield Change(name, before, file_state(content), content)
        elif lines:
            yield Change(name, before, file_state(content), content, lines + kept)
        else:
            yield Change(name, before, before, lines=kept)


class Nothing:
    """A field that one side lacks."""

    def __repr__(self) -> str:
        return "(none)"


NOTHING = Nothing()


def differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys((*old, *new)):
        before, after = old.get(key, NOTHING), new.get(key, NOTHING)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{path}{key}.")
        elif before != after or type(before) is not type(after):
            yield f"{path}{key}", before, after


def kept_lines(merged: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What stays other than in this repository."""
    found = list(differences(ours, merged))
    both = [one for one in found if NOTHING not in one[1:]]
    lines = [f"{at}: {shown(theirs)} kept (in this repository {shown(own)})" for at, own, theirs in both]
    more = [at for at, own, _ in found if own is NOTHING]
    less = [at for at, _, theirs in found if theirs is NOTHING]
    if more:
        lines.append(f"kept, not in this repository: {', '.join(more)}")
    if less:
        lines.append(f"not added, though in this repository: {', '.join(less)}")
    return lines


def shown(value: Any) -> str:
    text = repr(value) if value is NOTHING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


# ---------------------------------------------------------------------------------------------------------------- plan


def plan_changes(folder: Path, links: bool, manifest: dict[str, "Entry"]) -> list[Change]:
    """Every file that this repository puts beside weights, changed or not."""
    changes = list(config_changes(folder))
    for source in files_beside_weights():
        if source.name in MERGES:
            continue
        target, content = folder / source.name, source.read_bytes()
        before = state_of(target)
        after = State("link", str(source)) if links else file_state(content)
        same_file = target.is_symlink() and target.exists() and os.path.samefile(target, source)
        same_bytes = not links and target.is_file() and target.read_bytes() == content
        changes.append(Change(source.name, before, before if same_file or same_bytes else after, content))
    ours = {change.name for change in changes}
    for name, entry in manifest.items():
        # An earlier version had this file: what was there before it comes back.
        if name not in ours and name not in MERGES:
            content = b"" if entry.before.kind != "file" else (folder / BACKUP / name).read_bytes()
            changes.append(Change(name, state_of(folder / name), entry.before, content))
    return changes


def check_planned(folder: Path, changes: list[Change]) -> list[Finding]:
    """scripts.check on the folder as it would be: links to its files in a temporary folder, and the changed ones."""
    with tempfile.TemporaryDirectory(prefix="kimi_adopt_") as temporary:
        staged = Path(temporary)
        for path in folder.iterdir():
            if path.is_file():
                (staged / path.name).symlink_to(path.resolve())
        for change in changes:
            if change.before != change.after:
                (staged / change.name).unlink(missing_ok=True)
                if change.after.kind != "absent":
                    (staged / change.name).write_bytes(change.content)
        return [one._replace(says=one.says.replace(temporary, str(folder))) for one in check_folder(staged)]


# --------------------------------------------------------------------------------------------------- writing, reverting


class Entry(NamedTuple):
    """What a file was before the first run, and what this command made of it, the last one last."""

    before: State
    after: list[State]


def read_manifest(folder: Path) -> dict[str, Entry]:
    path = folder / BACKUP / MANIFEST
    if path.is_file():
        files = json.loads(path.read_bytes())["files"]
        return {
            name: Entry(State(*one["before"]), [State(*after) for after in one["after"]])
            for name, one in files.items()
        }
    if path.parent.exists() and any(one.name != PART for one in path.parent.iterdir()):
        raise ValueError(f"{path.parent} is not from this command: it has no {MANIFEST}. Move it away.")
    return {}


def put(target: Path, part: Path, state: State, content: bytes) -> None:
    """Makes a file what it should be, in one step: it is written to `part` on the same disk, and moved."""
    if state.kind == "absent":
        target.unlink(missing_ok=True)
        return
    part.unlink(missing_ok=True)
    if state.kind == "link":
        part.symlink_to(state.value)
    else:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    os.replace(part, target)


def keep(folder: Path, name: str, before: State) -> None:
    """Keeps a file that will be replaced: the file itself under a second name, or a copy. The manifest has the links."""
    kept, part = folder / BACKUP / name, folder / BACKUP / PART
    if before.kind != "file" or (kept.is_file() and file_state(kept.read_bytes()) == before):
        return
    part.unlink(missing_ok=True)
    try:
        os.link(folder / name, part)
    except OSError:  # a file system without hard links
        shutil.copy2(folder / name, part)
    os.replace(part, kept)


def changed_since(folder: Path, manifest: dict[str, Entry]) -> list[str]:
    """Files that are neither what they were before nor what this command made of them."""
    return [
        name
        for name, entry in manifest.items()
        if state_of(folder / name) not in (entry.before, *entry.after)
    ]


def write(folder: Path, changes: list[Change], manifest: dict[str, Entry]) -> None:
    wanted = [change for change in changes if change.before != change.after]
    if not wanted:
        return
    for change in wanted:
        entry = manifest.setdefault(change.name, Entry(change.before, []))
        if change.after not in entry.after:
            entry.after.append(change.after)
    kept = folder / BACKUP
    kept.mkdir(exist_ok=True)
    files = {name: {"before": entry.before, "after": entry.after} for name, entry in manifest.items()}
    put(kept / MANIFEST, kept / PART, State("file"), json_text({"files": files}).encode())
    for change in wanted:
        if change.before == manifest[change.name].before:
            keep(folder, change.name, change.before)
        put(folder / change.name, kept / PART, change.after, change.content)


def undo(folder: Path) -> str:
    """Restores the earlier state; returns what was done. Raises ValueError if it cannot, and then changes nothing."""
    manifest, kept = read_manifest(folder), folder / BACKUP
    if not manifest:
        raise ValueError(f"{folder} has no {BACKUP}/{MANIFEST}: there is nothing to undo.")
    if changed := changed_since(folder, manifest):
        raise ValueError(
            f"{', '.join(changed)} changed since --write; nothing was restored. Move your version away."
        )
    todo = [name for name, entry in manifest.items() if state_of(folder / name) != entry.before]
    for name in todo:
        before = manifest[name].before
        if before.kind == "file" and state_of(kept / name) != before:
            raise ValueError(f"{kept / name} is not the file that was kept there; nothing was restored.")
    for name in todo:
        before = manifest[name].before
        if before.kind == "file":
            os.replace(kept / name, folder / name)
        else:
            put(folder / name, kept / PART, before, b"")
    for name in (*manifest, PART, MANIFEST):
        (kept / name).unlink(missing_ok=True)
    if not any(kept.iterdir()):
        kept.rmdir()
    return f"{folder} is what it was: {len(todo)} files restored or removed."


# ------------------------------------------------------------------------------------------------------------- command


def report(folder: Path, changes: list[Change]) -> Iterator[str]:
    """What a run changes, and what it does not."""
    changed = [change for change in changes if change.before != change.after]
    groups = (
        ("add", [one for one in changed if one.before == ABSENT]),
        (
            "replace",
            [one for one in changed if ABSENT not in (one.before, one.after) and one.name not in MERGES],
        ),
        ("change", [one for one in changed if ABSENT not in (one.before, one.after) and one.name in MERGES]),
        ("remove", [one for one in changed if one.after == ABSENT]),
        ("keep", [one for one in changes if one.before == one.after]),
    )
    for verb, members in groups:
        plain = [one.name for one in members if not one.lines]
        if plain:
            yield wrapped(verb, ", ".join(plain))
        for one in members:
            if one.lines:
                yield wrapped(verb, one.name)
                yield from (wrapped("", line) for line in one.lines)
    ours = {change.name for change in changes}
    rest = sorted(
        path.name for path in folder.iterdir() if path.name not in ours and path.suffix in (".py", ".jinja")
    )
    if rest:
        yield wrapped("leave", f"{', '.join(rest)}: not read by this repository's code")


def wrapped(verb: str, text: str) -> str:
    """A paragraph behind a verb; without one it belongs to the line before."""
    indent = 9 if verb else 12
    first = f"{verb:{indent}}"
    return textwrap.fill(text, 110, initial_indent=first, subsequent_indent=" " * (indent + 2 * (not verb)))


def check_place(folder: Path, writing: bool) -> None:
    """Raises ValueError for a folder that this command must not or cannot change."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    if folder.resolve() == ROOT:
        raise ValueError(f"{folder} is this repository itself: its code is there already.")
    if writing and not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} is read-only for this user; nothing was written.")


def adopt(folder: Path, writing: bool, links: bool) -> int:
    check_place(folder, writing)
    manifest = read_manifest(folder)
    changes = plan_changes(folder, links, manifest)
    if conflicts := [
        one.name
        for one in changes
        if one.name not in MERGES
        and one.before != one.after
        and one.name in manifest
        and one.before not in (manifest[one.name].before, *manifest[one.name].after)
    ]:
        raise ValueError(
            f"{', '.join(conflicts)} changed since an earlier --write. Move your version away first."
        )
    print("\n".join(report(folder, changes)))
    findings = check_planned(folder, changes)
    if bad := [finding for finding in findings if not finding.ok]:
        print("\n" + "\n".join(f"BAD  {one.what:26} {one.says}" for one in bad))
        print(f"\n{folder} would not pass scripts.check: nothing was written.")
        return 1
    print(f"\nAll {len(findings)} checks pass{'' if writing else ' for the folder as it would be'}.")
    num_changes = sum(change.before != change.after for change in changes)
    if not num_changes:
        print("There is nothing to change.")
    elif writing:
        write(folder, changes, manifest)
        print(f"{num_changes} files written; --undo restores what was there, from {folder / BACKUP}.")
    else:
        print(f"A dry run: {num_changes} files would be written. --write does it.")
    print(f"\n{LOAD.format(folder=str(folder))}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.adopt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="change the folder")
    what.add_argument("--undo", action="store_true", help="restore what was there before the first --write")
    parser.add_argument(
        "--links", action="store_true", help="link the code to this clone, which must then stay"
    )
    options = parser.parse_args(arguments)
    if options.undo and options.links:
        parser.error("--undo takes no --links")
    try:
        if options.undo:
            check_place(options.folder, True)
            print(undo(options.folder))
            return 0
        return adopt(options.folder, options.write, options.links)
    except (ValueError, OSError) as error:
        print(f"adopt: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
