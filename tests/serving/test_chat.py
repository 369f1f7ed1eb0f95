"""Agents and frameworks, each in an environment of its own, against the scripted server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.served import CALL, FINAL, THINK

pytestmark = pytest.mark.clients
SCRIPTS = Path(__file__).parents[1] / "data" / "clients"
PACKAGES = ("openai-agents", "langchain-openai", "litellm", "pydantic-ai-slim[openai]", "llm")
AI_SDK = ("ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible")
CALLS = '{"city": "Rome 0"}'
LOOP = "['Rome 0', 'Rome 1', 'Rome 2']"
SAID = {
    "openai_agents": ["Sunny. " + LOOP, f"Sunny. {LOOP[:-1]}, {LOOP[1:]}"],
    "langchain_openai_client": ["blue", "blue", "{'city': 'Rome 0'}"] * 2,
    "litellm_client": ["blue | I shall say it.", "blue", CALLS],
    "pydantic_ai_client": ["blue", f"Sunny. {LOOP} True"] * 2,
}


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *PACKAGES]
    subprocess.run(install, check=True, timeout=900)
    return folder / "bin"


def run(command, url, **options):
    environment = {**os.environ, "BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "none"}
    environment |= {**options.pop("env", {}), "PWD": str(options.get("cwd", Path.cwd()))}
    done = subprocess.run(
        [str(word) for word in command],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180,
        check=False, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


@pytest.mark.parametrize("name", SAID)
def test_frameworks(server, python, name):
    assert run([python / "python", SCRIPTS / f"{name}.py"], server.url) == SAID[name]


def test_the_llm_command(server, python, tmp_path):
    model = f"- model_id: oss\n  model_name: gpt-oss\n  api_base: {server.url}/v1\n"
    (tmp_path / "extra-openai-models.yaml").write_text(model)
    command = [python / "llm", "-m", "oss", "say blue"]
    assert run(command, server.url, env={"LLM_USER_PATH": str(tmp_path)}) == ["blue"]


def npm(folder, *packages):
    install = ["npm", "install", "--silent", "--prefix", str(folder), *packages]
    subprocess.run(install, check=True, timeout=600)
    return folder


def test_the_ai_sdk(server, tmp_path):
    script = npm(tmp_path, *AI_SDK) / "ai_sdk.mjs"
    script.write_text((SCRIPTS / "ai_sdk.mjs").read_text())
    said = run(["node", script], server.url)
    assert said[0] == "blue | I shall say it."
    assert said[1:3] == ["blue", '{"city":"Rome 0"}']
    assert said[4:] == ["blue", '{"city":"Rome 0"}']


def test_codex_completes_a_task_with_two_commands(server, script, tmp_path):
    def agent(prompt):
        done = prompt.count("<|start|>functions.")
        commands = ["echo hello > made.txt", "cat made.txt"]
        if done == len(commands):
            return THINK.format("done") + FINAL.format("The file holds hello.")
        unified = "type exec_command" in prompt
        name = "exec_command" if unified else "shell"
        shell = {"command": ["bash", "-lc", commands[done]]}
        command = {"cmd": commands[done]} if unified else shell
        return THINK.format("run it") + CALL.format(name, json.dumps(command))

    script.answer = agent
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    codex = npm(tmp_path / "npm", "@openai/codex") / "node_modules/.bin/codex"
    options = ["exec", "--oss", "--local-provider", "lmstudio", "-m", "stand-in"]
    options += ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "Make it"]
    address = {"CODEX_HOME": str(home), "CODEX_OSS_BASE_URL": f"{server.url}/v1"}
    said = run([codex, *options], server.url, env=address, cwd=work)
    assert (work / "made.txt").read_text() == "hello\n"
    assert "The file holds hello." in said


def test_opencode_completes_a_task_with_two_commands(server, script, tmp_path):
    def agent(prompt):
        if "type bash" not in prompt:  # it asks for a title, too
            return FINAL.format("A file")
        done = prompt.count("<|start|>functions.")
        commands = ["echo hello > made.txt", "cat made.txt"]
        if done == len(commands):
            return FINAL.format("The file holds hello.")
        return CALL.format("bash", json.dumps({"command": commands[done], "description": "run it"}))

    script.answer = agent
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "quantkit",
        "options": {"baseURL": f"{server.url}/v1", "apiKey": "none"},
        "models": {"gpt-oss-20b": {"name": "gpt-oss"}},
    }
    (work / "opencode.json").write_text(json.dumps({"provider": {"quantkit": provider}}))
    command = npm(tmp_path / "npm", "opencode-ai") / "node_modules/.bin/opencode"
    offline = {"HOME": str(home), "OPENCODE_DISABLE_MODELS_FETCH": "1"}
    said = run(
        [command, "run", "-m", "quantkit/gpt-oss-20b", "Make it"], server.url, env=offline, cwd=work
    )
    assert (work / "made.txt").read_text() == "hello\n"
    assert "The file holds hello." in said
