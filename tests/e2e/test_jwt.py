"""Tokens that somebody else signs: who has a good one is a tenant, anybody else is nobody."""

import base64
import hashlib
import hmac
import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from authority import missing

import kvmesh
from kvmesh.cli import main

ISSUER, AUDIENCE = "https://id.test", "kvmesh"


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def openssl(*arguments: str, given: bytes | None = None) -> bytes:
    try:
        done = subprocess.run(["openssl", *arguments], input=given, check=True, capture_output=True)
    except FileNotFoundError:
        missing("openssl is not installed")
    return done.stdout


class Key:
    """A key that signs, and as a router's file has it."""

    def __init__(self, kid: str, algorithm: str, jwk: dict[str, str], sign: Callable) -> None:
        self.kid, self.algorithm = kid, algorithm
        self.jwk = {"kid": kid, "alg": algorithm, "use": "sig", **jwk}
        self._sign = sign

    def token(self, header: dict[str, Any] | None = None, **claims: Any) -> str:
        """A good token, but for what is given; None leaves a claim out."""
        now = int(time.time())
        all_claims = {"iss": ISSUER, "aud": AUDIENCE, "exp": now + 600, "sub": "shop", **claims}
        body = {name: value for name, value in all_claims.items() if value is not None}
        head = {"alg": self.algorithm, "kid": self.kid, "typ": "JWT", **(header or {})}
        text = ".".join(b64(json.dumps(part).encode()) for part in (head, body))
        return f"{text}.{b64(self._sign(text.encode()))}"


def hs256(kid: str, secret: bytes) -> Key:
    def sign(text: bytes) -> bytes:
        return hmac.new(secret, text, hashlib.sha256).digest()

    return Key(kid, "HS256", {"kty": "oct", "k": b64(secret)}, sign)


def rs256(kid: str, folder: Path) -> Key:
    file = folder / f"{kid}.pem"
    openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", str(file))
    said = openssl("rsa", "-in", str(file), "-noout", "-modulus").decode()
    modulus = bytes.fromhex(said.strip().partition("=")[2])

    def sign(text: bytes) -> bytes:
        return openssl("dgst", "-sha256", "-sign", str(file), given=text)

    return Key(kid, "RS256", {"kty": "RSA", "n": b64(modulus), "e": "AQAB"}, sign)


def es256(kid: str, folder: Path) -> Key:
    file = folder / f"{kid}.pem"
    curve = ("-pkeyopt", "ec_paramgen_curve:prime256v1")
    openssl("genpkey", "-algorithm", "EC", *curve, "-out", str(file))
    point = openssl("pkey", "-in", str(file), "-pubout", "-outform", "DER")[-64:]

    def sign(text: bytes) -> bytes:
        # ASN.1 has the two numbers each with its length, and shorter or longer by a byte.
        der = openssl("dgst", "-sha256", "-sign", str(file), given=text)
        shown = openssl("asn1parse", "-inform", "DER", given=der).decode()
        numbers = re.findall(r"INTEGER\s*:([0-9A-F]+)", shown)
        return b"".join(int(number, 16).to_bytes(32, "big") for number in numbers)

    jwk = {"kty": "EC", "crv": "P-256", "x": b64(point[:32]), "y": b64(point[32:])}
    return Key(kid, "ES256", jwk, sign)


def eddsa(kid: str, folder: Path) -> Key:
    file, message = folder / f"{kid}.pem", folder / f"{kid}.message"
    openssl("genpkey", "-algorithm", "ED25519", "-out", str(file))
    point = openssl("pkey", "-in", str(file), "-pubout", "-outform", "DER")[-32:]

    def sign(text: bytes) -> bytes:
        # This one it does not take from a pipe.
        message.write_bytes(text)
        arguments = ("-sign", "-inkey", str(file), "-rawin", "-in", str(message))
        return openssl("pkeyutl", *arguments)

    return Key(kid, "EdDSA", {"kty": "OKP", "crv": "Ed25519", "x": b64(point)}, sign)


def write(file: Path, *keys: Key) -> None:
    other = {"kty": "RSA", "use": "enc", "kid": "passed over", "n": "AQAB", "e": "AQAB"}
    file.write_text(json.dumps({"keys": [other, *(key.jwk for key in keys)]}))


def flags(file: Path) -> tuple[str, ...]:
    return (
        "--jwt-keys", str(file), "--jwt-issuer", ISSUER, "--jwt-audience", AUDIENCE,
        "--jwt-leeway", "5s",
    )  # fmt: skip


def asked(endpoint: str, token: str | None) -> kvmesh.MeshError | None:
    """What a small request is refused with; None: it was answered."""
    with kvmesh.Client(endpoint, token=token) as client:
        try:
            client.complete(prompt="Open", max_tokens=2)
        except kvmesh.MeshError as error:
            return error
    return None


def nobody(error: kvmesh.MeshError | None) -> bool:
    return (
        error is not None
        and error.code is grpc.StatusCode.UNAUTHENTICATED
        and error.reason == "UNAUTHENTICATED"
        and str(error) == "UNAUTHENTICATED: a valid key is needed, as `authorization: Bearer KEY`"
    )


def test_good_tokens_open_and_all_others_say_the_same_nothing(fresh, tmp_path, capsys) -> None:
    secret = hs256("h", b"s" * 32)
    rsa, curve, edwards = (make(kid, tmp_path) for kid, make in
                           (("r", rs256), ("c", es256), ("e", eddsa)))  # fmt: skip
    file = tmp_path / "jwks.json"
    write(file, secret, rsa, curve, edwards)
    endpoint = fresh.start_router(*flags(file))
    fresh.start_worker("w", "both")
    good = secret.token()
    with kvmesh.Client(endpoint, token=good) as client:
        while not any(model.ready for model in client.models()):
            fresh.children.wait(0.02)

    for key in (secret, rsa, curve, edwards):
        assert asked(endpoint, key.token()) is None, key.algorithm
        assert asked(endpoint, key.token({"kid": None})) is None, key.algorithm
        assert asked(endpoint, key.token(aud=["other", AUDIENCE])) is None, key.algorithm
    now = int(time.time())
    assert asked(endpoint, secret.token(exp=now + 60, nbf=now)) is None

    stranger = hs256("h", b"x" * 32)
    head, body, signature = good.split(".")
    none = b64(json.dumps({"alg": "none"}).encode())
    # The public key as a secret: what is known to all would sign for all (RFC 8725, 2.1).
    public = base64.urlsafe_b64decode(rsa.jwk["n"] + "==")
    confused = hs256("r", public)
    wrong = {
        "none": None,
        "no token": "kvmesh-guess",
        "parts": "a.b.c",
        "unsigned": f"{none}.{body}.",
        "cut": f"{head}.{body}.{signature[:-2]}",
        "other body": f"{head}.{secret.token(sub='bank').split('.')[1]}.{signature}",
        "stranger": stranger.token(),
        "confused": confused.token(),
        "another's kid": secret.token({"kid": "r"}),
        "unknown kid": secret.token({"kid": "z"}),
        "unknown crit": secret.token({"crit": ["x"], "x": 1}),
        "expired": secret.token(exp=now - 60),
        "not yet": secret.token(nbf=now + 3600),
        "for ever": secret.token(exp=None),
        "issuer": secret.token(iss="https://id.other"),
        "no issuer": secret.token(iss=None),
        "audience": secret.token(aud="other"),
        "no audience": secret.token(aud=None),
        "no tenant": secret.token(sub=None),
        "tenant of no text": secret.token(sub=7),
        "tenant of none": secret.token(sub=""),
        "tenant with a control character": secret.token(sub="a\x1fb"),
    }
    for why, token in wrong.items():
        assert nobody(asked(endpoint, token)), why
    log = fresh.routers[endpoint].log.read_text()
    assert not any(token.rpartition(".")[2] in log for token in wrong.values() if token and
                   len(token.rpartition(".")[2]) > 8)  # fmt: skip

    # OpenAI's face asks for the same.
    assert main(["models", "--endpoint", endpoint, "--token", good]) == 0
    capsys.readouterr()


def test_a_tokens_tenant_has_the_limits_and_is_whom_the_file_of_keys_names(
    fresh, tmp_path, capsys
) -> None:
    assert main(["key", "shop"]) == 0
    made = capsys.readouterr()
    key_file, file = tmp_path / "keys.toml", tmp_path / "jwks.json"
    assert main(["key", "--operator"]) == 0
    operator = capsys.readouterr()
    key_file.write_text(made.out + "concurrency = 1\n" + operator.out)
    signer = hs256("h", b"s" * 32)
    write(file, signer)
    endpoint = fresh.start_router(
        *flags(file), "--api-keys", str(key_file), "--jwt-tenant-claim", "org"
    )
    fresh.start_worker("w", "both")
    shop, bank = signer.token(org="shop"), signer.token(org="bank")
    api_key = made.err.split()[-1]
    with kvmesh.Client(endpoint, token=shop) as client:
        while not any(model.ready for model in client.models()):
            fresh.children.wait(0.02)
        running = client.generate(prompt="On", max_tokens=3_000, ignore_end_of_text=True)
        next(running)
        for token in (shop, api_key):
            limited = asked(endpoint, token)
            assert limited is not None
            assert limited.reason == "TENANT_LIMIT"
        assert asked(endpoint, bank) is None
        running.close()
    # Nobody operates by a token.
    assert main(["workers", "--endpoint", endpoint, "--token", shop]) == 1
    assert "permission denied" in capsys.readouterr().err
    assert main(["workers", "--endpoint", endpoint, "--token", operator.err.split()[-1]]) == 0


def test_keys_are_changed_without_a_restart(fresh, tmp_path) -> None:
    old, new = hs256("old", b"o" * 32), hs256("new", b"n" * 32)
    file = tmp_path / "jwks.json"
    write(file, old)
    endpoint = fresh.start_router(*flags(file))
    fresh.start_worker("w", "both")
    with kvmesh.Client(endpoint, token=old.token()) as client:
        while not any(model.ready for model in client.models()):
            fresh.children.wait(0.02)
    assert nobody(asked(endpoint, new.token()))
    log = fresh.routers[endpoint].log
    file.write_text('{"keys": [{"kty": "oct", "k": "c2hvcnQ"}]}')
    while "jwt_keys_not_changed" not in log.read_text():
        fresh.children.wait(0.05)
    assert "shorter than the 256 bits" in log.read_text()
    assert "c2hvcnQ" not in log.read_text()
    assert asked(endpoint, old.token()) is None
    write(file, new)
    while asked(endpoint, new.token()) is not None:
        fresh.children.wait(0.05)
    assert nobody(asked(endpoint, old.token()))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("not json", "line 1 column"),
        ('{"keys": []}', "no key that can be used"),
        ('{"keys": [{"kty": "oct", "k": "c2hvcnQ"}]}', "shorter than the 256 bits"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_at_the_start(content, said, tmp_path, capsys) -> None:
    file = tmp_path / "jwks.json"
    if content is not None:
        file.write_text(content)
    assert main(["router", "--listen", "127.0.0.1:0", *flags(file)]) == 2
    told = capsys.readouterr().err
    assert "jwt_keys" in told
    assert str(file) in told
    assert said in told
