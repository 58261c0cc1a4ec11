"""The script that puts edgeflash beside its peers, as far as it goes without them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

PEERS = Path(__file__).parent / "benchmarks/peers"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("peers", PEERS / "__main__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "peers", module)
    spec.loader.exec_module(module)
    return module


def answer(*runs_ms: float) -> dict[str, Any]:
    return {"runs_ms": runs_ms, "load_ms": 5, "first_ms": 9, "peak_rss_mib": 100}


def test_rows_are_told_over_the_first_and_over_the_best_peer(peers: Any) -> None:
    found = {
        "diffusers, eager": [answer(400, 420), answer(380, 400)],
        "OpenVINO GenAI, int8 file": [answer(100, 100)],
        "edgeflash, onnx int8": [answer(50, 50, 90)],
    }
    rows = peers.table(found, {"optimum": "no such wheel"}).splitlines()
    assert [row.split("|")[-3:-1] for row in rows[2:5]] == [
        [" 1.00 ", " 4.00 "],
        [" 0.25 ", " 1.00 "],
        [" 0.12 ", " 0.50 "],
    ]
    assert rows[-1] == "optimum: no such wheel"


def test_a_peer_that_fails_says_why_in_a_line(peers: Any) -> None:
    script = "import sys; print('warned', file=sys.stderr); sys.exit('no such model')"
    with pytest.raises(peers.Failed, match=r"^no such model$"):
        peers.check([sys.executable, "-c", script])
    assert peers.check([sys.executable, "-c", "print('told')"]) == "told\n"


def test_a_failed_peer_costs_no_other_its_row(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(peer: Any, given: Any) -> dict[str, Any]:
        if "compile" in peer.name:
            raise peers.Failed("no compiler")
        return answer(100)

    monkeypatch.setattr(peers, "prepare", lambda *_: None)
    monkeypatch.setattr(peers, "ask", ask)
    words = ["peers", str(tmp_path / "student"), "--work", str(tmp_path), "--only", "diffusers"]
    monkeypatch.setattr(sys, "argv", words)
    peers.main()
    out = capsys.readouterr().out
    assert "| diffusers, eager, bf16 | 100 |" in out and "torch.compile: no compiler" in out
    assert '"no compiler"' in (tmp_path / "peers.json").read_text()
