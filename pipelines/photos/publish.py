"""Hand a domain's trained networks and results to the repository, as artefact and files that need no photographs.

python publish.py faces      in this folder, after dvc repro; then look at git status in the root, and commit

What takes hours, training and the judgement of the generator, stays as dvc.lock says that it ran; all else has to be as
its stages would make it today. Photographs, executed notebooks and figures full of them stay here, but for
the small figure of docs/photographs.md.
"""

import json
import shutil
import subprocess
import sys
from hashlib import md5
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = {
    "faces": ("UTKFace, tight crops of adults; https://susanqq.github.io/UTKFace/", "non-commercial research only"),
    "cats": ("AFHQ cats; https://github.com/clovaai/stargan-v2", "CC BY-NC 4.0"),
}
KEPT = ("train-", "samples@")  # stages of which only what they wrote, and is published, has to be theirs
RESULTS = ("curves/**/*.tsv", "metrics/*.json", "rows/*.json", "rows/*.csv", "tables/*", "timing/*.json")


def run(*command: str, cwd: Path = ROOT) -> str:
    """Standard output of a command. CalledProcessError if it fails."""
    return subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True, check=True).stdout


def locked_since(path: Path) -> str:
    """The first commit whose dvc.lock knows what a file holds now; "" if none does yet."""
    commits = run("git", "log", "--format=%h", f"-S{md5(path.read_bytes()).hexdigest()}", "--", "dvc.lock", cwd=HERE)
    return "".join(commits.split()[-1:])


def provenance(domain: str) -> dict:
    """Where the networks of checkpoints/DOMAIN-64 come from: commit, settings and photographs."""
    stages = yaml.safe_load((HERE / "dvc.lock").read_text())["stages"]
    source, terms = SOURCES[domain]
    (photographs,) = (dep for dep in stages[f"data@{domain}"]["deps"] if dep["path"].startswith("sources/"))
    return {
        "trained_by": "pipelines/photos, settings in its params.yaml and in each file",
        "commit": run("git", "describe", "--always", "--dirty", "--exclude=*").strip(),
        "generator_since": locked_since(HERE / f"checkpoints/{domain}-64/generator.safetensors"),
        "photographs": source,
        "terms": terms,
        "photographs_md5": photographs["md5"],
    }


def spoilt(part: dict | str) -> bool:
    """Whether outputs of a stage are not what it wrote, by a part of what `dvc status` says. The figure of nearest
    photographs, which is never published, may be gone, and no output has to lie in DVC's cache."""
    outs = part.get("changed outs", {}) if isinstance(part, dict) else {}
    return any(how not in ("not in cache", "deleted") or how == "deleted" and "/figures/nearest" not in path
               for path, how in outs.items())  # fmt: skip


def publish(domain: str) -> None:
    """Copy, record and push. SystemExit if DVC says that anything of the domain is not as its stages would make it."""
    names = [name for name in run("dvc", "stage", "list", "--name-only", cwd=HERE).split() if f"@{domain}" in name]
    status = json.loads(run("dvc", "status", "--json", *names, cwd=HERE))
    differs = [name for name, parts in status.items() if not name.startswith(KEPT) or any(map(spoilt, parts))]
    if differs:
        sys.exit(f"publish: first dvc repro, since these differ from what was run: {', '.join(differs)}")
    meta, folder = provenance(domain), f"{domain}-64"  # of a tree that the copies have not changed yet
    shutil.rmtree(ROOT / "results" / folder, ignore_errors=True)
    shared = [path for part in ("tables", "figures") for path in (HERE / "results" / part).glob(f"{domain}*")]
    for path in [*shared, *(p for pattern in RESULTS for p in (HERE / "results" / folder).glob(pattern))]:
        target = ROOT / path.relative_to(HERE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    networks = Path("checkpoints", folder)
    shutil.rmtree(ROOT / networks, ignore_errors=True)
    shutil.copytree(HERE / networks, ROOT / networks)
    run("dvc", "add", "--quiet", str(networks))
    file = ROOT / f"{networks}.dvc"
    record = yaml.safe_load(file.read_text())
    record |= {
        "desc": f"Networks of {domain} at 64², and directions of 06_attribute_editing",
        "meta": meta,
    }
    file.write_text(yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=120))
    run("dvc", "push", "--quiet", str(file))
    run(sys.executable, "tools/readme.py")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in SOURCES:
        sys.exit(f"publish: expected one of {', '.join(SOURCES)}")
    publish(sys.argv[1])
