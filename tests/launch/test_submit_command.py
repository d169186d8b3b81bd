"""``llm-parallel submit`` as a command: site defaults, what is checked, and the copy of the run file that jobs read."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import BaseModel

from llm_launch import submitted
from llm_launch.agent_step import AgentStep
from llm_launch.lease import Lease
from llm_launch.site import site_files, with_site
from llm_launch.submit_request import SubmitRequest
from llm_launch.submitted import changes_since, freeze, frozen_text
from llm_parallel.config.load import dump_given, load_config
from llm_parallel.errors import UserError
from llm_parallel.train.preflight import preflight, preflight_job
from llm_parallel.worker.launch import submit_command
from tests.support.data_helpers import prepare_small, write_token_file

CONFIGS = Path(__file__).parents[2] / "configs"
RUN_FILES = sorted({*CONFIGS.glob("*.yaml")} - {CONFIGS / "first-sweep.yaml"})
HERE = AgentStep()


def fake(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def there(tmp_path: Path) -> dict[str, str]:
    """An environment with an sbatch that takes every job and an squeue without jobs."""
    (tmp_path / "bin").mkdir()
    fake(tmp_path / "bin", "sbatch", f'cp "${{@: -1}}" {tmp_path}/taken; echo 7')
    fake(tmp_path / "bin", "squeue", "true")
    return {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(tmp_path), "USER": "me"}


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run of 4 processes on CPUs, with data."""
    write_token_file(tmp_path / "tokens", [np.arange(4000, dtype=np.int32) % 500], np.uint16)
    tree = {
        "run_dir": str(tmp_path / "run"), "device": "cpu", "model": {"preset": "debug", "vocab_size": 512},
        "data": {"train": [str(tmp_path / "tokens")], "seq_length_tokens": 32, "eval_fraction": 0.0},
        "train": {"global_batch_size": 4, "steps": 10}, "parallel": {"dp": 4},
    }  # fmt: skip
    path = tmp_path / "my run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def submit(run_file: Path, there: dict[str, str], *overrides: str, dry: bool = False, **asked: Any) -> int:
    request = SubmitRequest(**{"nodes": 2, "gpus_per_node": 0, **asked})
    return submit_command(str(run_file), overrides, (request, HERE), dry, there)


def test_site_defaults(tmp_path: Path) -> None:
    """The command line wins over the project, the project over the user; lists are joined in the other direction."""
    user, project = tmp_path / "user.yaml", tmp_path / "project.yaml"
    user.write_text("partition: slow\nqos: 5\ntime: 12:00:00\nsbatch: --mail-type=end\nshared: true\nsrun: [--user]\n")
    project.write_text("partition: fast\ngpus-per-node: 4\ntime:\nsrun: [--project]\nagent-python: python3\n")
    request, step = SubmitRequest(2, account="team", options=("--x",)), AgentStep(("--mine",))
    request, step, names = with_site(request, step, project)
    assert names == ["gpus_per_node", "partition", "srun", "agent_python"]
    request, step, names = with_site(request, step, user)
    assert request == SubmitRequest(
        2, 4, account="team", partition="fast", qos="5", time="12:00:00", shared=True,
        options=("--mail-type=end", "--x"),
    )  # fmt: skip
    assert step == AgentStep(("--user", "--project", "--mine"), "python3")
    given = SubmitRequest(2, 1, partition="mine", shared=False)
    assert with_site(given, HERE, user)[0] == replace(given, qos="5", time="12:00:00", options=("--mail-type=end",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partiton: x", "partiton is no option of submit; the nearest is partition"),
        ("nodes: 4", "nodes differs from run to run; give it to submit as --nodes"),
        ("gpus_per_node: eight", "gpus_per_node = eight must be a whole number"),
        ("shared: maybe", "shared = maybe must be true or false"),
        ("partition: [a, b]", "partition must be one value"),
        ("srun: {a: b}", "srun must be a text or a list of texts"),
        ("- a", "must hold options of submit, one a line"),
        ("a: [", ":1: not valid YAML"),
    ],
)
def test_bad_site_files(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "slurm.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        with_site(SubmitRequest(1), HERE, path)
    with pytest.raises(UserError, match="cannot be read"):
        with_site(SubmitRequest(1), HERE, tmp_path)


def test_where_site_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    home = {"HOME": str(tmp_path / "home")}
    assert site_files(SubmitRequest(1), home) == []
    user = tmp_path / "home" / ".config" / "llm-parallel" / "slurm.yaml"
    user.parent.mkdir(parents=True)
    user.write_text("")
    Path("slurm.yaml").write_text("")
    assert site_files(SubmitRequest(1), home) == [user, Path("slurm.yaml")]
    assert site_files(SubmitRequest(1), {"XDG_CONFIG_HOME": str(user.parents[1])}) == [user, Path("slurm.yaml")]
    assert site_files(SubmitRequest(1, site="/dev/null"), home) == [Path("/dev/null")]
    assert with_site(SubmitRequest(1), HERE, Path("/dev/null"))[2] == []


def given_fields(node: BaseModel) -> dict[str, Any]:
    """The fields of a tree that were given, section by section."""
    found = {}
    for name in node.model_fields_set:
        value = getattr(node, name)
        found[name] = given_fields(value) if isinstance(value, BaseModel) else value
    return found


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_the_copy_is_the_run_file(path: Path, tmp_path: Path) -> None:
    """Read back, it is the same run, which also knows what was given and what is a default."""
    config = load_config(path, ["optim.lr=3e-4", "run_dir=/runs/ü # 1"], notice=lambda _: None)
    assert config.run_dir == "/runs/ü # 1"
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_given(config), encoding="utf-8")
    again = load_config(copy, notice=lambda _: None)
    assert again == config and given_fields(again) == given_fields(config)


def test_a_run_is_submitted_as_it_is_now(
    run_file: Path, there: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its copy holds the overrides; what is written into the run file later is not in it, and a copy that was changed,
    or another version, is said at the start."""
    run = tmp_path / "run"
    assert submit(run_file, there, "optim.lr=0.5", spares=1) == 0
    said = capsys.readouterr().out
    assert "job 7;" in said and f"{run / 'submit.yaml'}, a copy of the run file: change it there" in said
    before = load_config(run / "submit.yaml", notice=lambda _: None)
    assert (before.optim.lr, before.elastic.spare_nodes, before.log.line_interval_s) == (0.5, 1, 10.0)
    assert f"launch {run}/submit.yaml\n" in (tmp_path / "taken").read_text()
    run_file.write_text(run_file.read_text().replace("steps: 10", "steps: 20"))
    assert load_config(run / "submit.yaml", notice=lambda _: None).train.steps == 10
    facts = json.loads((run / "submit.json").read_text())
    assert facts["job"] == "7" and facts["overrides"] == ["optim.lr=0.5"] and facts["run_file"] == str(run_file)
    now = facts["versions"]
    assert {"python", "torch", "megatron-core", "commit"} <= now.keys()
    assert changes_since(run / "submit.yaml", now) == []
    other = {**now, "torch": "9.9", "commit": "unknown"}
    assert changes_since(run / "submit.yaml", other) == [
        f"since the job was submitted the installation has changed: torch {now['torch']} then and 9.9 now"
    ]
    with (run / "submit.yaml").open("a") as copy:
        copy.write("seed: 3\n")
    (said,) = changes_since(run / "submit.yaml", now)
    assert said == f"{run / 'submit.yaml'} was changed since the job was submitted, and is what it trains"
    assert changes_since(run_file, other) == []


def test_a_job_behind_another_must_train_the_same(run_file: Path, there: dict[str, str], tmp_path: Path) -> None:
    assert submit(run_file, there) == 0
    script = tmp_path / "run" / "submit.sbatch"
    fake(tmp_path / "bin", "squeue", f"printf '7\\x1fPENDING\\x1fme\\x1fx\\x1f{script}\\n'")
    with pytest.raises(UserError, match=r"has job 7 already \(pending\).*change submit.yaml there.*--behind"):
        submit(run_file, there)
    assert submit(run_file, there, behind=True) == 0
    with pytest.raises(UserError, match=r"--behind: the job before it reads .* differs"):
        submit(run_file, there, "optim.lr=0.5", behind=True)
    assert load_config(tmp_path / "run" / "submit.yaml", notice=lambda _: None).optim.lr != 0.5


def test_a_folder_in_which_a_run_trains_is_refused(run_file: Path, there: dict[str, str], tmp_path: Path) -> None:
    """Here; of another machine's run, which may have been killed, it is said."""
    with Lease(tmp_path / "run", {}):
        with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on"):
            submit(run_file, there)
    assert submit(run_file, there) == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.train=[/nowhere/tokens]", "/nowhere/tokens"),
        ("model.vocab_size=100", "100"),
        ("parallel.dp=3", "global_batch_size"),
        ("device=cuda", "device = cuda, and --gpus-per-node 0"),
        ("checkpoint.load=/nowhere", "/nowhere"),
        ("train.epochs=2", "train.epochs = 2 counts passes over conversations"),
        ("run_dir=/proc/run", "run_dir = /proc/run"),
    ],
)
def test_what_a_dry_run_of_training_checks_is_checked(
    override: str, words: str, run_file: Path, there: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is written or asked; a dry run of submit shows the batch file and says it."""
    with pytest.raises(UserError, match=words):
        submit(run_file, there, override)
    assert not (tmp_path / "run").exists() and not (tmp_path / "taken").exists()
    try:
        assert submit(run_file, there, override, dry=True) == 0
    except UserError as error:  # the layout itself is wrong
        assert words in str(error)
    else:
        shown = capsys.readouterr()
        assert shown.out.startswith("#!/bin/bash\n") and "submit would refuse this now: " in shown.err


def test_the_layout_must_fit_the_gpus(run_file: Path, there: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"parallel\.tp"):
        submit(run_file, there, "parallel.tp=2", "device=auto", "parallel.dp=null", nodes=3, gpus_per_node=3)


def test_every_run_of_an_array_is_checked(run_file: Path, there: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.seq_length_tokens"):
        submit(run_file, there, array="data.seq_length_tokens=32,4096000")
    assert submit(run_file, there, array="optim.lr=1e-4,3e-4") == 0
    assert "optim.lr=3e-4" in (tmp_path / "taken").read_text()


def test_the_commit_is_of_this_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown where it is no repository, or git is missing."""
    monkeypatch.setattr(submitted, "__file__", str(tmp_path / "x.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert submitted.versions()["commit"] == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submitted.versions()["commit"] == "unknown"
    freeze(tmp_path, frozen_text(load_config(CONFIGS / "first-run.yaml", notice=lambda _: None)), {})
    assert changes_since(tmp_path / "submit.yaml", {**submitted.versions(), "commit": "abc"}) == []


@pytest.fixture
def chain(run_file: Path, there: dict[str, str], tmp_path: Path) -> Path:
    """A run file of conversations that begins with the model of ``run_file``, whose job 7 waits. It names no sizes and
    no tokenizer."""
    prepare_small("a", tmp_path, "docs")
    tree = yaml.safe_load(run_file.read_text())
    tree["data"]["train"] = [str(tmp_path / "set" / "docs")]
    del tree["model"]["vocab_size"]
    run_file.write_text(yaml.safe_dump(tree))
    assert submit(run_file, there) == 0
    turns = [{"role": "user", "content": "what is 1?"}, {"role": "assistant", "content": "it is one."}]
    (tmp_path / "chats.jsonl").write_text(20 * (json.dumps({"messages": turns}) + "\n"))
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump({
        "run_dir": str(tmp_path / "sft"), "device": "cpu", "checkpoint": {"load": str(tmp_path / "run")},
        "chat": {"train": [str(tmp_path / "chats.jsonl")]}, "data": {"seq_length_tokens": 32}, "parallel": {"dp": 2},
        "train": {"global_batch_size": 2, "epochs": 1},
    }))  # fmt: skip
    return path


def test_a_chain_of_jobs_is_submitted_before_the_first_has_a_model(
    chain: Path, there: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fine-tuning after pretraining, preferences after fine-tuning: each is checked with the sizes and the tokenizer
    that the run files before it give, and a mistake in it is found now."""
    with pytest.raises(UserError, match=r"holds no checkpoint yet, and job 7 .* give --after 7 for a job that starts"):
        submit(chain, there)
    with pytest.raises(UserError, match="job 7 is to train it"):
        submit(chain, there, after="12")
    with pytest.raises(UserError, match=r"chats\.json does not exist"):
        submit(chain, there, f"chat.train=[{tmp_path}/chats.json]", after="7")
    with pytest.raises(UserError, match=r"parallel\.tp = 3"):
        submit(chain, there, "parallel.tp=3", after="7")
    fake(tmp_path / "bin", "sbatch", f'echo "$@" > {tmp_path}/asked; cp "${{@: -1}}" {tmp_path}/taken; echo 8')
    assert submit(chain, there, after="7,3") == 0
    said = capsys.readouterr()
    assert f"model: as in {tmp_path / 'run'}" in said.err and "before job 7 has made one" in said.err
    asked, taken = (tmp_path / "asked").read_text(), (tmp_path / "taken").read_text()
    assert "--dependency=afterok:7:3,singleton --kill-on-invalid-dep=yes" in asked
    assert "afterok" not in taken and "--dependency=singleton" in taken  # the file may be submitted again years later
    tree = yaml.safe_load(chain.read_text())
    tree |= {"run_dir": str(tmp_path / "dpo"), "method": {"kind": "dpo"}, "checkpoint": {"load": str(tmp_path / "sft")}}
    answers = {"prompt": "what is 1?", "chosen": "it is one.", "rejected": "no."}
    (tmp_path / "pairs.jsonl").write_text(20 * (json.dumps(answers) + "\n"))
    tree |= {"chat": {"train": [str(tmp_path / "pairs.jsonl")]}, "data": {"seq_length_tokens": 128}}
    last = tmp_path / "dpo.yaml"
    last.write_text(yaml.safe_dump(tree))
    assert submit(last, there, after="8", dry=True) == 0
    shown = capsys.readouterr()
    assert "submit would refuse" not in shown.err and "sbatch is given --dependency=afterok:8,singleton" in shown.err


def test_a_start_needs_the_model_itself(chain: Path) -> None:
    """Whatever its job was promised."""
    config = load_config(chain, notice=lambda _: None)
    with pytest.raises(UserError, match="holds no checkpoint; give a run folder"):
        preflight(config)
    with pytest.raises(UserError, match="holds no checkpoint; give a run folder"):
        preflight_job(config, 0, 2)


def test_runs_that_begin_with_each_others_models(chain: Path, there: dict[str, str], tmp_path: Path) -> None:
    """Which a copy that was changed afterwards can ask for."""
    copy = tmp_path / "run" / "submit.yaml"
    tree = yaml.safe_load(copy.read_text())
    copy.write_text(yaml.safe_dump({**tree, "checkpoint": {"load": str(tmp_path / "run")}}))
    with pytest.raises(UserError, match="begin with each other's models"):
        submit(chain, there, after="7")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("sft", r"`llm-parallel submit RUN\.yaml`, without sft"),
        ("evaluate", r"evaluate runs on one node as a job of SLURM's own: `sbatch .*--wrap 'llm-parallel evaluate …'`"),
        ("evalute.yaml", "evalute.yaml does not exist"),
    ],
)
def test_other_commands_in_the_place_of_a_run_file(given: str, words: str, there: dict[str, str]) -> None:
    with pytest.raises(UserError, match=words):
        submit(Path(given), there)
