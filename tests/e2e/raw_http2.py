"""HTTP/2 by hand: what no gRPC library lets a client do.

Half a message, a reset at a chosen moment, a socket that ends without a word,
a reader that does not read. Source: RFC 9113; RFC 7541 for header blocks, of
which only literals are written and only one header is looked for.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn

from kvmesh.v1 import inference_pb2

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
CANCEL = 0x8

GENERATE = "/kvmesh.v1.Inference/Generate"

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADER_TABLE_SIZE, _INITIAL_WINDOW_SIZE = 1, 4
_DEFAULT_WINDOW = 65_535

# Codes of RFC 7541, appendix B, for the characters of "grpc-status" and digits.
_HUFFMAN = {
    "0": "00000", "1": "00001", "2": "00010", "3": "011001", "4": "011010", "5": "011011",
    "6": "011100", "7": "011101", "8": "011110", "9": "011111", "a": "00011", "c": "00100",
    "g": "100110", "p": "101011", "r": "101100", "s": "01000", "t": "01001", "u": "101101",
    "-": "010110",
}  # fmt: skip


def message(request: inference_pb2.GenerateRequest) -> bytes:
    """A gRPC message: its prefix and its bytes."""
    return prefixed(request.SerializeToString())


def prefixed(body: bytes) -> bytes:
    """Bytes behind the prefix of a gRPC message."""
    return struct.pack(">BI", 0, len(body)) + body


@dataclass(frozen=True, slots=True)
class Frame:
    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def ends_stream(self) -> bool:
        return self.kind == RST_STREAM or (
            self.kind in (DATA, HEADERS) and bool(self.flags & END_STREAM)
        )


class ConnectionEndedError(Exception):
    """The server closed the connection."""


class RawHttp2:
    """One connection; streams get odd ids from 1 on."""

    def __init__(
        self, address: str, *, window: int = 1 << 24, receive_buffer: int | None = None
    ) -> None:
        """`window`: bytes a stream may send us; it is renewed as they are read."""
        host, _, port = address.rpartition(":")
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(60)
        self.socket.connect((host, int(port)))
        self._pending = b""
        self._next = 1
        self._window = _DEFAULT_WINDOW
        self._statuses: dict[int, int | None] = {}
        # Without a table of headers every block can be read by itself.
        settings = struct.pack(">HIHI", _HEADER_TABLE_SIZE, 0, _INITIAL_WINDOW_SIZE, window)
        self.socket.sendall(_PREFACE + _frame(SETTINGS, 0, 0, settings))
        if window > _DEFAULT_WINDOW:
            self._send(WINDOW_UPDATE, 0, 0, struct.pack(">I", window - _DEFAULT_WINDOW))

    def __enter__(self) -> RawHttp2:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()

    # -- sending -----------------------------------------------------------

    def call(self, body: bytes, *, end: bool = True, path: str = GENERATE) -> int:
        """Begins a call and sends these bytes of its message. Returns the stream."""
        stream, self._next = self._next, self._next + 2
        headers = _literals(
            {
                ":method": "POST",
                ":scheme": "http",
                ":path": path,
                ":authority": "router",
                "content-type": "application/grpc",
                "te": "trailers",
            }
        )
        self._send(HEADERS, END_HEADERS, stream, headers)
        self.send(stream, body, end=end)
        return stream

    def send(self, stream: int, body: bytes, *, end: bool = True) -> None:
        """Sends bytes of a call's message, as the connection's window allows."""
        while len(body) > self._window:
            self.frame()
        self._window -= len(body)
        self._send(DATA, END_STREAM if end else 0, stream, body)

    def reset(self, stream: int) -> None:
        """Cancels a call."""
        self._send(RST_STREAM, 0, stream, struct.pack(">I", CANCEL))

    def ping(self, payload: bytes) -> None:
        """Sends a ping of eight bytes; its answer is a frame to be read."""
        self._send(PING, 0, 0, payload)

    def vanish(self) -> None:
        """Ends the connection without a word of HTTP/2: the peer gets a TCP reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _send(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        self.socket.sendall(_frame(kind, flags, stream, payload))

    # -- reading -----------------------------------------------------------

    def frame(self) -> Frame:
        """The next frame; answers what the protocol wants answered."""
        head = self._read(9)
        length = int.from_bytes(head[:3], "big")
        kind, flags = head[3], head[4]
        stream = int.from_bytes(head[5:9], "big") & 0x7FFF_FFFF
        frame = Frame(kind, flags, stream, self._read(length))
        if kind in (SETTINGS, PING) and not flags & ACK:
            self._send(kind, ACK, 0, frame.payload if kind == PING else b"")
        elif kind == WINDOW_UPDATE and stream == 0:
            self._window += int.from_bytes(frame.payload, "big")
        elif kind == DATA and frame.payload:
            self._send(WINDOW_UPDATE, 0, 0, struct.pack(">I", length))
            if not frame.ends_stream:
                self._send(WINDOW_UPDATE, 0, stream, struct.pack(">I", length))
        elif kind == HEADERS:
            self._statuses[stream] = _grpc_status(frame.payload)
        return frame

    def read_pending(self) -> None:
        """Reads what has come already; waits for nothing."""
        while self._pending or select.select([self.socket], [], [], 0)[0]:
            self.frame()

    def read_to_end(self) -> NoReturn:
        """Reads until the server closes the connection, which raises."""
        while True:
            self.frame()

    def status(self, stream: int) -> int | None:
        """Reads until a call has ended; its grpc-status, None if it was reset."""
        while not (frame := self.frame()).ends_stream or frame.stream != stream:
            pass
        return self._statuses.get(stream) if frame.kind != RST_STREAM else None

    def ended_with(self, stream: int) -> int | None:
        """The grpc-status of a call whose end was read; None if it was reset."""
        return self._statuses.get(stream)

    def statuses(self, streams: set[int]) -> dict[int, int | None]:
        """As `status`, of several calls."""
        ended: dict[int, int | None] = {}
        while ended.keys() != streams:
            frame = self.frame()
            if frame.ends_stream and frame.stream in streams:
                reset = frame.kind == RST_STREAM
                ended[frame.stream] = None if reset else self._statuses.get(frame.stream)
        return ended

    def events(self, stream: int) -> Iterator[inference_pb2.GenerateResponse]:
        """Messages of a generation as they come, until it ends."""
        return map(inference_pb2.GenerateResponse.FromString, self.messages(stream))

    def messages(self, stream: int) -> Iterator[bytes]:
        """Messages of a call as they come, until it ends."""
        data = b""
        while not (frame := self.frame()).ends_stream or frame.stream != stream:
            if frame.kind == DATA and frame.stream == stream:
                data += frame.payload
            while len(data) >= 5 and len(data) >= 5 + (length := int.from_bytes(data[1:5], "big")):
                yield data[5 : 5 + length]
                data = data[5 + length :]

    def _read(self, length: int) -> bytes:
        while len(self._pending) < length:
            more = self.socket.recv(1 << 16)
            if not more:
                raise ConnectionEndedError
            self._pending += more
        taken, self._pending = self._pending[:length], self._pending[length:]
        return taken


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _literals(headers: dict[str, str]) -> bytes:
    """Header block: literals without indexing, without Huffman code."""
    block = b""
    for name, value in headers.items():
        assert max(len(name), len(value)) < 127
        block += b"\0" + bytes([len(name)]) + name.encode()
        block += bytes([len(value)]) + value.encode()
    return block


def _huffman(text: str) -> bytes:
    bits = "".join(_HUFFMAN[character] for character in text)
    bits += "1" * (-len(bits) % 8)
    coded = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return bytes([0x80 | len(coded)]) + coded


def _grpc_status(block: bytes) -> int | None:
    """The grpc-status in a header block, plain or in Huffman code."""
    for code in range(17):
        for name in (_huffman("grpc-status"), b"\x0bgrpc-status"):
            plain = bytes([len(str(code))]) + str(code).encode()
            for value in (_huffman(str(code)), plain):
                if name + value in block:
                    return code
    return None
