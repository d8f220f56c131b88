"""The documentation is executed: every Python block, every link, every row of the cost table."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch

import ritz

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(p.relative_to(ROOT)) for p in PAGES]
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def blocks(text: str) -> list[tuple[int, str]]:
    """(line of the first statement, code) of every Python fence."""
    return [(text.count("\n", 0, found.start(1)), found.group(1)) for found in FENCE.finditer(text)]


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own, on the first forward mode
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_blocks_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All blocks of a page run in one namespace, in order; line numbers in a traceback are those of the page."""
    namespace: dict[str, object] = {"__name__": page.stem}
    dtype = torch.get_default_dtype()
    try:
        for line, code in blocks(page.read_text(encoding="utf-8")):
            exec(compile("\n" * line + code, str(page), "exec", dont_inherit=True), namespace)
    finally:
        torch.set_default_dtype(dtype)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [t for t in LINK.findall(text) if "://" not in t]
    missing = [t for t in targets if not (page.parent / t).exists()]
    assert not missing, f"{page.name} links to what is not there: {missing}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    absent = [name for name in NAMES if not name.endswith("README.md") and name.removeprefix("docs/") not in index]
    assert not absent, f"docs/README.md does not mention {absent}"


# -- costs.md: a row of five cells is a call and its four costs, all Python expressions -------------------------------


def cost_rows() -> list[list[str]]:
    page = (ROOT / "docs" / "costs.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if len(row) == 5]


def stored_vectors(n: int, known: set[int]) -> float:
    """Vectors of n float64 numbers in all tensors that Python can see, except those at ``known`` addresses."""
    gc.collect()
    storages = {}
    for x in gc.get_objects():
        if type(x) is torch.Tensor and x.layout == torch.strided and x.device.type == "cpu":
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    if not known:
        known.update(storages)
        return 0.0
    return sum(size for address, size in storages.items() if address not in known) / (8 * n)


@pytest.mark.parametrize("row", cost_rows(), ids=lambda row: row[0])
def test_costs(row: list[str]) -> None:
    call, forward, backward, paired, kept = row
    n, k, m, p = 3000, 20, 3, 4
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    i = torch.arange(n)
    index = torch.stack([torch.cat([i, i[1:], i[:-1]]), torch.cat([i, i[:-1], i[1:]])])
    entries = torch.cat([torch.linspace(3, 22, n, dtype=torch.float64), -torch.ones(2 * n - 2, dtype=torch.float64)])
    values = torch.sparse_coo_tensor(index, entries, (n, n)).coalesce().to_sparse_csr()
    stored = values.values().clone().requires_grad_()
    sparse = ritz.operators.Sparse(values.crow_indices(), values.col_indices(), stored, (n, n), hermitian=True)
    with torch.no_grad():
        sparse @ draw(n)  # what a matrix builds once for itself is not a cost of the calls
    count = ritz.Counting(sparse)
    names = {name: getattr(ritz, name) for name in ritz.__all__} | {
        name: getattr(ritz.functions, name) for name in ("log", "exp")
    }
    names |= {"A": count, "v": draw(n), "u": draw(n), "V": draw(n, m), "k": k, "m": m, "p": p}
    names |= {name: torch.linspace(0.01, 0.1, p, dtype=torch.float64) for name in ("times", "sigmas")}

    known: set[int] = set()
    stored_vectors(n, known)
    result = eval(call, names)
    total = sum(y.sum() for y in ([result] if isinstance(result, torch.Tensor) else result) if y.requires_grad)
    del result
    vectors = stored_vectors(n, known)
    products = (count.num_forward, count.num_adjoint)
    total.backward()
    assert stored.grad is not None and bool(stored.grad.any())

    starts = p if "times" in call else m if "V" in call or "Hutchinson" in call else 1
    names["r"] = min(20, -(-count.num_paired // starts))
    assert sum(products) == eval(forward, names), "products forward"
    assert count.num_matvecs - sum(products) == eval(backward, names), "products backward"
    assert count.num_paired <= eval(paired, names), "columns of the pairing"
    if kept.startswith(">"):
        assert vectors > eval(kept[1:], names), "vectors kept until backward"
    else:
        assert abs(vectors - eval(kept, names)) < 1.0, "vectors kept until backward"
