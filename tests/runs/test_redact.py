"""No secret is left in any file of a run, a report or an offline log, and nothing harmless is blotted out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from genzoo import data, runs
from genzoo.runs import Run, redact
from genzoo.runs.redact import MARK, redact_words, remember
from tests import children

ROOT = Path(__file__).parents[2]
blot = redact.redact


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """Neither secrets of this machine nor those of other tests."""
    monkeypatch.setattr(redact, "_remembered", set())
    for name in list(os.environ):
        if redact._is_secret_variable(name, "not-a-word-1"):
            monkeypatch.delenv(name)


SECRET_KEYS = """
    api_key apikey apiKey API_KEY x-api-key wandb_api_key openai_api_key logger.api_key api_key_2 password Password passwd
    passphrase db_password dbPassword PGPASSWORD mysql_pwd db_pass smtp_pass secret client_secret clientSecret
    clientsecret secrets secret_key secretAccessKey aws_secret_access_key aws_access_key_id access_key access_token
    accessToken accesstoken auth_token refresh_token id_token session_token token hf_token github_token bot_token
    github_pat OAuthToken private_key privateKey ssh_key encryption_key signing_key account_key AccountKey
    credentials credential authorization Authorization api_keys access_tokens
"""
HARMLESS_KEYS = """
    num_tokens tokens max_tokens tokenizer key keys key_dim keyword monkey author authors secretary passes bypass low_pass
    optimizer.key sort_key public_key primary_key hotkey token_dim token_type tokenize pad_token eos_token mask_token
    class_token start_token password_file secret_name token_path authentic authority compass passage pwd_dir cookies_eaten
    monkeys turkey keynote seed sampler.steps images_seen
"""


@pytest.mark.parametrize("key", SECRET_KEYS.split())
def test_texts_under_a_secret_name_are_blotted_and_numbers_are_not(key):
    assert blot({key: "some thing"}) == {key: MARK}
    assert blot({"a": [{key: ["one", {"b": "two"}]}]}) == {"a": [{key: [MARK, {"b": MARK}]}]}
    for harmless in (5, 0.5, True, None, "", [1, 2], {"n": None}):
        assert blot({key: harmless}) == {key: harmless}
    for text in (f"{key}=s0me,thing", f"+a.{key}=s0me thing", f"{key}={{a:s0me}}"):
        assert redact_words([text]) == [f"{text.partition('=')[0]}={MARK}"]
    for text in (
        f"{key}=s0me: must be less",
        f"a='{key}': 's0me', 'n': 3",
        f'{{"{key}": "s0me", "n": 3}}',
        f"x {key}:s0me",
    ):
        found = blot(text)
        assert "s0me" not in found and found.replace(MARK, "s0me") == text
    for text in (f"{key}=5", f"{key}=1e-3", f"{key}=true", f"{key}=null", f"unknown key 'a.{key}': did you mean 'n'?"):
        assert blot(text) == text and redact_words([text]) == [text]


@pytest.mark.parametrize("key", HARMLESS_KEYS.split())
def test_harmless_names_stay(key):
    for value in (
        {key: "some-thing 5"},
        f"{key}=some-thing5",
        f'{{"{key}": "some-thing5"}}',
        [{key: ["a", {"b": "c"}]}],
    ):
        assert blot(value) == value
    assert redact_words([f"+{key}=a,b"]) == [f"+{key}=a,b"]


SECRET_TEXTS = {  # what must go, and what is left
    "https://me:hunter22@host/x": ("hunter22", "https://{}@host/x"),
    "https:/me:hunter22@host/x is no folder": ("hunter22", "https:/{}@host/x is no folder"),
    "/home/a/https:/me:hunter22@host": ("hunter22", "/home/a/https:/{}@host"),
    "https://hunter22@host/x": ("hunter22", "https://{}@host/x"),
    "https://me:hunter@22@host/x": ("22", "https://{}@host/x"),
    "postgresql+psycopg://me:hunter22@host:5432/db": ("hunter22", "postgresql+psycopg://{}@host:5432/db"),
    "redis://:hunter22@host": ("hunter22", "redis://{}@host"),
    "https://h/x?n=3&token=abc&m=4": ("abc", "https://h/x?n=3&token={}&m=4"),
    "https://h/x?sig=a%2Fb#y": ("a%2Fb", "https://h/x?sig={}#y"),
    "https://h/x?key=abc": ("abc", "https://h/x?key={}"),
    "https://h/x?a=b&amp;access_token=abc": ("abc", "https://h/x?a=b&amp;access_token={}"),
    "https://h/x#access_token=abc": ("abc", "https://h/x#access_token={}"),
    "s3://b?X-Amz-Date=1&X-Amz-Signature=abc": ("abc", "s3://b?X-Amz-Date=1&X-Amz-Signature={}"),
    "s3://b?X-Amz-Credential=abc&x=1": ("abc", "s3://b?X-Amz-Credential={}&x=1"),
    "s3://b?AWSAccessKeyId=abc&Signature=def": ("abc", "s3://b?AWSAccessKeyId={}&Signature={}"),
    "AccountName=a;AccountKey=abc==;EndpointSuffix=c": ("abc", "AccountName=a;AccountKey={};EndpointSuffix=c"),
    "logger={api_key:abc,mode:offline}": ("abc", "logger={{api_key:{},mode:offline}}"),
    "Authorization: Bearer abc.def-12345": ("abc.def", "Authorization: Bearer {}"),
    "api_key 0123456789abcdef0123456789abcdef01234567": ("012345", "api_key {}"),
    "ghp_" + "aB3" * 12: ("aB3", "{}"),
    "x github_pat_" + "aB3_" * 12: ("aB3", "x {}"),
    "glpat-" + "aB3-" * 5: ("aB3", "{}"),
    "'hf_" + "aBc" * 11 + "'": ("aBc", "'{}'"),
    "sk-proj-" + "aB3-" * 8: ("aB3", "{}"),
    "sk-ant-api03-" + "aB3_" * 8: ("aB3", "{}"),
    "sk_live_" + "aB3" * 8: ("aB3", "{}"),
    "xoxb-123456789012-abcdef": ("123456", "{}"),
    "AKIAIOSFODNN7EXAMPLE": ("IOSF", "{}"),
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl": ("eyJ", "{}"),
    "-----BEGIN RSA PRIVATE KEY-----\nMIIabc\n-----END RSA PRIVATE KEY----- x": ("MIIabc", "{} x"),
}


@pytest.mark.parametrize("text", SECRET_TEXTS)
def test_addresses_and_shapes_are_known(text):
    secret, expected = SECRET_TEXTS[text]
    found = blot(text)
    assert secret not in found and found == expected.replace("{}", MARK).replace("{{", "{").replace("}}", "}")
    assert blot(found) == found
    assert blot({"x": [text], "y": 1}) == {"x": [found], "y": 1}


@pytest.mark.parametrize(
    "text",
    [
        *("ssh://git@github.com/a/b", "git@github.com:a/b", "https://host:8080/@scope/x", "me@example.org", "a:b@c d"),
        *("https://h/x?n=3&page=4&num_tokens=5", "token: expected a name", "token", "the secret: use fewer steps"),
        *(
            "0123456789abcdef0123456789abcdef01234567",
            "sha256:" + "ab12" * 16,
            "step-00012",
            "sk-learn-like-estimators",
        ),
        *(
            "task-of-9-parts-and-more-words",
            "AKIA",
            "hf_hub",
            "bearer",
            "2026-01-01T00:00:00+00:00",
            "python -m genzoo",
        ),
        *(
            "KeyError: 'token'",
            "pool=token",
            "trainer.batch_size=64",
            "C:/me@home/x",
            "data.root=my pictures",
            "[redacted]",
        ),
    ],
)
def test_harmless_texts_stay(text):
    assert blot(text) == text and redact_words([text]) == [text]


def test_an_object_is_no_secret_whatever_it_is_called():
    model = {"token": {"_target_": "genzoo.nn.mlp.MLP", "width": "wide", "api_key": "x"}}
    assert blot(model) == {"token": {"_target_": "genzoo.nn.mlp.MLP", "width": "wide", "api_key": MARK}}


def test_the_environments_secrets_are_known_by_their_values(monkeypatch, tmp_path):
    for name, value in {
        "WANDB_API_KEY": "0123456789" * 4,
        "HF_TOKEN": "abc def'\"\\ghi",
        "PGPASSWORD": "correcthorse",
        "STRIPE_KEY": "pk-12345678",
    }.items():
        monkeypatch.setenv(name, value)
        written = [value, repr(value), json.dumps(value), f"x{value}y", yaml.safe_dump({"a": value})]
        for text in written:
            found = blot({"why": [text]})["why"][0]
            assert value not in found and MARK in found, text
    assert blot("%27 abc%20def%27%22%5Cghi") == f"%27 {MARK}"  # in a URL
    # Not in names of settings and of metrics; nor places, words and what is short.
    assert blot({"correcthorse/n": 1, "ghp_" + "aB3" * 12: 2}) == {"correcthorse/n": 1, MARK: 2}
    for name, value in {
        "SORT_KEY": "filename",
        "A_TOKEN": "short",
        "KEY_FILE": "file1234",
        "B_SECRET": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
        assert blot(f"a {value}.") == f"a {value}."
    monkeypatch.setenv("PWD", "/no/where/at/all")
    assert blot("/no/where/at/all/x") == "/no/where/at/all/x"


def test_what_was_typed_is_known_by_its_value():
    remember({"x": {"api_key": "abc def ghi"}, "root": "some-where"}, ["+y.password=a b,c;d e", "n=12345678"])
    assert blot("it says: abc def ghi or a b,c;d e") == f"it says: {MARK} or {MARK}"
    assert blot("some-where and 12345678") == "some-where and 12345678"


@pytest.mark.parametrize(
    "harmless",
    [
        *({"pad_token": "<pad>"}, {"tokenizer": {"mask_token": "[MASK]", "eos_token": "</s>", "max_tokens": 128}}),
        *({"token": 7, "password": None, "secret": True, "api_key": ""}, {"key": "filename", "keys": ["a", "b"]}),
        *({"unit": "squared distance"}, {"schedule": "cosine", "seeds": [0, 1]}, {"_target_": "genzoo.nn.mlp.MLP"}),
    ],
)
def test_harmless_settings_stay(harmless):
    assert blot(harmless) == harmless


@pytest.mark.parametrize(
    "token", ["ghp_" + "aB3" * 12, "hf_" + "aBc" * 11, "wandb_v1_" + "aB3" * 12, "sk-" + "aB3" * 9]
)
def test_a_token_as_the_name_of_a_project_is_kept_nowhere(token):
    assert blot({"logger": {"project": token, "mode": "offline"}}) == {"logger": {"project": MARK, "mode": "offline"}}
    assert redact_words([f"logger.project={token}"]) == [f"logger.project={MARK}"]


@pytest.mark.parametrize(
    "text", ["a:b@" * 20_000, "x=" * 50_000, 'token="' * 20_000, "a" * 200_000 + "=", "http://@" * 20_000]
)
def test_long_texts_take_no_time(text):
    begun = time.perf_counter()
    blot(text)
    assert time.perf_counter() - begun < 2


def test_what_is_harmless_is_given_back_soon():
    harmless = {
        "metrics": {f"test/{i}": {"value": i / 3, "card": {"unit": "bits", "n": [i, (1, "a")]}} for i in range(300)}
    }
    assert blot(harmless) == harmless
    begun = time.perf_counter()
    for _ in range(20):
        blot(harmless)
    assert (time.perf_counter() - begun) / 20 < 0.1


# Where texts enter files


def test_the_files_of_a_run_hold_no_secret(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["genzoo", "+logger.api_key=Canary one", "data.root=https://a:Canary2@b/c", "seed=3"]
    )
    monkeypatch.setenv("MY_PASSWORD", "Canary-three")
    config = {"seed": 3, "logger": {"api_key": "Canary4"}, "note": "is Canary-three"}
    run = Run.create(tmp_path, "vae-digits", config)
    run.update_status(why="ValueError: Canary-three is refused, password=Canary5")
    run.log(event="note", text="token=Canary6", values={"x": 1.5})
    run.write_result({"metrics": {"n": {"value": 1, "card": {"protocol": {"url": "http://x?sig=Canary7"}}}}})
    assert run.config == {"seed": 3, "logger": {"api_key": MARK}, "note": f"is {MARK}"}
    assert config["logger"]["api_key"] == "Canary4", "what trains is what was typed"
    assert run.status["command"] == f"python -m genzoo '+logger.api_key={MARK}' 'data.root=https://{MARK}@b/c' seed=3"
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert len(files) == 5 and not [path for path in files if b"Canary" in path.read_bytes()]


def test_a_report_holds_no_secret_of_the_runs_that_it_reads(tmp_path):
    from genzoo.report import records

    run = Run.create(tmp_path, "vae-digits", {})
    (run.path / "config.yaml").write_text("model: {api_key: Canary1}\nseed: 0\n")
    runs.write_atomically(run.path / "status.json", b'{"state": "failed", "why": "Bearer Canary22", "model": "vae"}')
    (record,), broken = records.read([run.path])
    assert (record.config, record.unscored, broken) == (
        {"model": {"api_key": MARK}, "seed": 0},
        f"failed: Bearer {MARK}",
        [],
    )


# The command, from its words to the last byte of its files


def digits(login: str = "", **options: object) -> data.DataSet:
    """A reader of a user's own, with secrets among its arguments."""
    if login:
        raise ValueError(f"the server does not know {options['user']} with {login}")
    return data.digits()


ENVIRONMENT = {
    "WANDB_API_KEY": "c0ffee01" * 5,
    "HF_TOKEN": "hf_Canary102abcdefghijklmnopq",
    "AWS_SECRET_ACCESS_KEY": "Canary103/abc+def",
    "AWS_ACCESS_KEY_ID": "AKIACANARY104ABCDEFG",
    "MY_PASSWORD": "Canary105 with 'blanks'",
    "GITHUB_TOKEN": "ghp_Canary106abcdefghijklmnopqrs",
    "DB_PASS": "Canary-107",
    "STRIPE_KEY": "Canary-108",
    "CLIENT_SECRET": "Canary-109",
    "PGPASSWORD": "canaryonehundredten",
}
YAML = """
defaults: [digits]
source:
  _target_: tests.runs.test_redact.digits
  api_key: Canary201
  password: "Canary202, with, more"
  access_token: Canary203
  clientSecret: Canary204
  refreshToken: [Canary205, Canary206]
  credentials: {user: Canary207, pin: "Canary208"}
  headers: ["Authorization: Bearer Canary209xyz", "X-Api-Key: Canary210"]
  url: https://me:Canary211@example.org/x?n=3&key=Canary212
  signed: https://example.org/x?X-Amz-Signature=Canary213&X-Amz-Credential=Canary214
  json: '{"secret_key": "Canary215", "n": 3}'
  key_file: "-----BEGIN PRIVATE KEY-----\\nCanary216\\n-----END PRIVATE KEY-----"
  slack: xoxb-Canary217-abcdef
  jwt: eyJCanary218abc.eyJCanary218abc.Canary218abc
  from_environment: ["${oc.env:WANDB_API_KEY}", "${oc.env:MY_PASSWORD}", "x${oc.env:STRIPE_KEY}y", "${oc.env:PGPASSWORD}"]
  also: {secret: "${oc.env:AWS_SECRET_ACCESS_KEY}", name: "${oc.env:DB_PASS}", id: "${oc.env:AWS_ACCESS_KEY_ID}"}
  num_tokens: 5
  key_dim: three
  tokenizer: bpe
  author: me
  keys: [a, b]
  token: 7
"""
WORDS = [
    "+data.source.wandb_key=${oc.env:WANDB_API_KEY}",
    "+data.source.auth_token='Canary301 with blanks'",
    "+data.source.options={api_key:Canary302,mode:offline}",
    "+data.source.passphrase=Canary303",
    "+data.root='https://me:Canary304@example.org/x?token=Canary305&n=3'",
    "+data.source.sas='https://example.org/x?sig=Canary306%2Fabc'",
    "+data.source.hub=hf_Canary307abcdefghijklmnopq",
    "+data.source.gitlab=glpat-Canary308abcdefghijk",
    "+data.source.listed=[Canary-108,Canary-109]",
]


def test_no_secret_is_in_any_file_of_a_run_its_log_or_its_comparison(tmp_path):
    (tmp_path / "conf/data").mkdir(parents=True)
    (tmp_path / "conf/data/mine.yaml").write_text(YAML)
    here = tmp_path / "here"
    here.mkdir()
    subprocess.run(["git", "init", "-q", str(here)], check=True)
    remote = "https://me:Canary401@example.org/x.git"
    subprocess.run(["git", "-C", str(here), "remote", "add", "origin", remote], check=True)

    def genzoo(*words: str) -> subprocess.CompletedProcess[str]:
        return children.run(
            [sys.executable, "-m", "genzoo", *words],
            cwd=here,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), "WANDB_BASE_URL": "http://127.0.0.1:9"},
            capture_output=True,
            text=True,
            check=False,
        )

    common = ["--config-dir", "../conf", "model=vae", "data=mine", "budget=smoke", "trainer.threads=1", *WORDS]
    train = genzoo("-m", *common, "logger=wandb", "logger.mode=offline", "seed=0")
    assert train.returncode == 0, train.stderr
    compared = genzoo(
        "compare", "runs=outputs", "out=compared", "title=Canary-109", "logger=wandb", "logger.mode=offline"
    )
    assert compared.returncode == 0, compared.stderr
    login = ["+data.source.login=Canary-501", "+data.source.user='someone, Canary-107'"]
    refused = genzoo(*common, *login, "+data.source.api_token=Canary-501")
    said = f"genzoo: data: the server does not know someone, {MARK} with {MARK}\n"
    assert (refused.returncode, refused.stderr) == (2, said)

    planted = re.findall(r"Canary-?\d{3}", " ".join([YAML, *WORDS, remote, *login]))
    secrets = {*ENVIRONMENT.values(), *planted, "Canary", "CANARY"}
    assert len(secrets) >= 40
    said = f"{train.stdout}{train.stderr}{compared.stdout}{compared.stderr}{refused.stdout}{refused.stderr}"
    files = [path for path in here.rglob("*") if path.is_file() and ".git" not in path.parts]
    kinds = {".yaml", ".json", ".jsonl", ".html", ".csv", ".md", ".wandb", ".log", ".pt", ".png"}
    assert kinds <= {path.suffix for path in files}
    content = {str(path): path.read_bytes() for path in files} | {"terminal": said.encode()}
    assert not [(name, secret) for name, text in content.items() for secret in secrets if secret.encode() in text]

    # And what is none is there.
    (run,) = (here / "outputs").glob("vae-*/2*")
    source = Run(run).config["data"]["source"]
    harmless = {"num_tokens": 5, "key_dim": "three", "tokenizer": "bpe", "author": "me", "keys": ["a", "b"], "token": 7}
    assert {key: source[key] for key in harmless} == harmless
    assert source["url"] == f"https://{MARK}@example.org/x?n=3&key={MARK}"
