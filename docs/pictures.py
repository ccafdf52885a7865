"""A hook of MkDocs: pictures that lie outside of `docs/` become part of the site.

The pages name them by their paths in the repository, as any viewer of the repository wants.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
FOLDERS = ("examples", "benchmarks/results")


def on_files(files, config):
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*.png")):
            uri = f"{folder}/{path.name}"
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, **_):
    return re.sub(rf"\]\(\.\./({'|'.join(FOLDERS)})/", r"](\1/", markdown)
