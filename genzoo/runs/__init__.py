"""Run directories: storage, validation and provenance. Nothing here imports torch."""

from genzoo.runs.errors import ResourceError, RunError
from genzoo.runs.files import (
    WANDB_LINKS,
    check_tree,
    check_writable,
    read_file,
    storing,
    sync,
    write_atomically,
    writing,
)
from genzoo.runs.formats import PICTURE_BYTES, YAML_BYTES, check_event, parse_json, parse_yaml, read_json, to_json
from genzoo.runs.provenance import SCHEMA, UNHASHED_KEYS, job_id, now, provenance
from genzoo.runs.run import FILES, FOLDERS, Run, mark_dead_runs

__all__ = [
    "ResourceError",
    "RunError",
    "WANDB_LINKS",
    "check_tree",
    "check_writable",
    "read_file",
    "storing",
    "sync",
    "write_atomically",
    "writing",
    "PICTURE_BYTES",
    "YAML_BYTES",
    "check_event",
    "parse_json",
    "parse_yaml",
    "read_json",
    "to_json",
    "SCHEMA",
    "UNHASHED_KEYS",
    "job_id",
    "now",
    "provenance",
    "FILES",
    "FOLDERS",
    "Run",
    "mark_dead_runs",
]
