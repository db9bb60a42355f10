"""Certificates of a test's own authority, made by openssl."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


def missing(text: str) -> None:
    """Skips; in CI it is a failure, so that nobody believes in what was never checked."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{text}; with CI=true this may not be skipped", pytrace=False)
    pytest.skip(text)


@dataclass(frozen=True)
class Issued:
    """Files of a certificate and its key."""

    certificate: Path
    key: Path


class Authority:
    """One that only this test trusts."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        if shutil.which("openssl") is None:
            missing("openssl is not installed")
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.ca = folder / f"{name}.pem"
        self._key = folder / f"{name}.key"
        self._openssl(
            "req", "-x509", *_new_key(self._key), "-out", str(self.ca),
            "-subj", f"/CN={name}", "-days", "2",
        )  # fmt: skip

    def issue(self, name: str, *alternative_names: str) -> Issued:
        """A certificate for both sides of a connection; names as openssl writes them."""
        issued = Issued(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        request, extensions = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        extensions.write_text(
            f"subjectAltName={','.join(alternative_names)}\n"
            "extendedKeyUsage=serverAuth,clientAuth\n"
        )
        self._openssl(
            "req", *_new_key(issued.key), "-out", str(request), "-subj", f"/CN={name}"
        )  # fmt: skip
        self._openssl(
            "x509", "-req", "-in", str(request), "-CA", str(self.ca), "-CAkey", str(self._key),
            "-CAcreateserial", "-days", "2", "-extfile", str(extensions),
            "-out", str(issued.certificate),
        )  # fmt: skip
        return issued

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)


def _new_key(file: Path) -> tuple[str, ...]:
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    return (*curve, "-keyout", str(file))
