"""A server that speaks OpenAI's HTTP alone, over a real socket.

    python fake_openai.py PORT STEP_MS SLOW_WHILE

As vLLM, SGLang or llama.cpp, which differ in what they tell besides; or as one that tells
no token ids. A request ends with its connection.
"""

import asyncio
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "vllm")]

from fake_model import BLOCK, BLOCKS, CONTEXT, END, MODEL, FakeModel, Running

OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llamacpp", "other": "somebody"}


class FakeOpenAi:
    def __init__(
        self, model: FakeModel, kind="vllm", key="", can_abort=True, deterministic=False
    ) -> None:
        self.model = model
        self.kind = kind
        self.key = key
        self.can_abort = can_abort
        self.paths: list[str] = []
        self.kept_back: dict[int, tuple[int, str]] = {}
        """By the place of a token that is told alone of its character: how many before it are
        kept back, and the character."""
        self.ends: tuple[int, ...] = (END,)
        """Ids at which llama.cpp ends by itself."""
        self.deterministic = deterministic
        """Whether SGLang draws by the seeds of its requests."""
        self.spelling: dict[str, list[int]] = {}
        """What /tokenize says of a text."""
        self.lingers = False
        """Whether an answer's body stays open behind its last event."""
        self.connections = 0
        self.closed = 0
        """Of them, those that a client has closed within an answer that was over."""
        self.completed_on: list[int] = []
        """Which connection each request for a completion came on."""

    async def connected(self, reader, writer) -> None:
        self.connections += 1
        number = self.connections
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                if head.split()[1] == "/v1/completions":
                    self.completed_on.append(number)
                await self._answer(head, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, head, reader, writer) -> None:
        lines = head.split("\r\n")
        path = lines[0].split()[1]
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.paths.append(path)
        if self.key and headers.get("authorization") != f"bearer {self.key}":
            self._send(writer, 401, {"error": "no"})
        elif path == "/v1/completions":
            await self._complete(json.loads(body), reader, writer)
        elif path == "/v1/models":
            model = {"id": MODEL, "owned_by": OWNERS[self.kind], "root": f"/models/{MODEL}"}
            if self.kind in ("vllm", "sglang"):
                model["max_model_len"] = CONTEXT
            self._send(writer, 200, {"data": [model]})
        elif path == "/props" and self.kind == "llamacpp":
            settings = {"n_ctx": CONTEXT}
            self._send(writer, 200, {"default_generation_settings": settings, "total_slots": 4})
        elif path == "/server_info" and self.kind == "sglang":
            self._send(writer, 200, {"enable_deterministic_inference": self.deterministic})
        elif path == "/tokenize" and self.kind == "llamacpp":
            self._send(writer, 200, {"tokens": self.spelling[json.loads(body)["content"]]})
        elif path == "/metrics" and self.kind != "other":
            self._send(writer, 200, self._metrics())
        elif path == "/inference/v1/abort_requests" and self.kind == "vllm" and self.can_abort:
            for name in json.loads(body)["request_ids"]:
                self.model.abort(name.removeprefix("cmpl-").removesuffix("-0"))
            self._send(writer, 200, {})
        elif path == "/abort_request" and self.kind == "sglang":
            self.model.abort(json.loads(body)["rid"])
            self._send(writer, 200, {})
        else:
            self._send(writer, 404, {"detail": "Not Found"})

    def _metrics(self) -> str:
        running = len(self.model.running) - self.model.waiting
        if self.kind == "vllm":
            return (
                f'vllm:cache_config_info{{block_size="{BLOCK}",num_gpu_blocks="{BLOCKS}"}} 1.0\n'
                f'vllm:num_requests_running{{engine="0"}} {running}\n'
                f'vllm:num_requests_waiting{{engine="0"}} {self.model.waiting}\n'
                f'vllm:kv_cache_usage_perc{{engine="0"}} {self.model.usage}\n'
            )
        if self.kind == "sglang":
            return (
                f"sglang:num_running_reqs {running}\nsglang:num_queue_reqs 0\n"
                f"sglang:token_usage {self.model.usage}\n"
                f"sglang:max_total_num_tokens {BLOCK * BLOCKS}\n"
            )
        return f"llamacpp:requests_processing {running}\n"

    @staticmethod
    def _send(writer, status, content) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(text.encode())}\r\n\r\n"
        writer.write((head + text).encode())

    async def _complete(self, asked, reader, writer) -> None:
        self.model.requests.append(asked)
        if self.model.fail is not None:
            status, text = self.model.fail.args
            self._send(writer, status, {"error": {"message": text}})
            return
        name = str(asked.get("request_id") or asked.get("rid") or len(self.model.requests))
        ends = self.kind in ("vllm", "sglang")
        running = Running(
            asked["prompt"],
            asked["max_tokens"],
            asked.get("min_tokens", 0),
            tuple(asked["stop_token_ids"]) if ends else self.ends,
        )
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        gone = asyncio.create_task(reader.read(1))
        made = self.model.run(name, running)
        try:
            while True:
                step = asyncio.ensure_future(anext(made, None))
                await asyncio.wait((step, gone), return_when=asyncio.FIRST_COMPLETED)
                if not step.done():
                    step.cancel()
                    raise ConnectionError("the client has gone")
                if (told := step.result()) is None:
                    break
                if self.kind == "llamacpp":
                    for event in self._as_llama_cpp(asked, told, len(running.output)):
                        self._event(writer, event)
                else:
                    self._event(writer, self._choice(asked, told))
                    if told.finish is not None:
                        self._event(writer, {"choices": [], "usage": self._usage(asked)})
                await writer.drain()
                if told.finish is not None:
                    break
            self._event(writer, None)
            if self.lingers:
                await gone
                self.closed += 1
                raise ConnectionError("the client has gone")
            writer.write(b"0\r\n\r\n")
        finally:
            gone.cancel()
            running.aborted = True
            await asyncio.gather(gone, return_exceptions=True)
            await made.aclose()
            self.model.running.pop(name, None)

    @staticmethod
    def _event(writer, content) -> None:
        text = "[DONE]" if content is None else json.dumps(content)
        data = f"data: {text}\n\n".encode()
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _as_llama_cpp(self, asked, told, made) -> list[dict]:
        """A token's event where its text is whole; the end by itself, with the usage."""
        timings = {"predicted_n": made} if asked.get("timings_per_token") else {}
        hidden = {
            place - back
            for place, (many, _) in self.kept_back.items()
            for back in range(1, many + 1)
        }
        events = []
        if told.ids and made - 1 not in hidden:
            event = self._choice(asked, told)
            event["choices"][0] |= {
                "finish_reason": None, "text": self.kept_back.get(made - 1, (0, ""))[1],
            }  # fmt: skip
            events.append({**event, "timings": timings})
        if told.finish is not None:
            choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": told.finish}
            events.append({"choices": [choice], "usage": self._usage(asked), "timings": timings})
        return events

    def _usage(self, asked) -> dict:
        usage = {"prompt_tokens": len(asked["prompt"]), "prompt_tokens_details": None}
        if self.model.cached:
            usage["prompt_tokens_details"] = {"cached_tokens": self.model.cached}
        return usage

    def _choice(self, asked, told) -> dict:
        choice = {"index": 0, "text": "", "finish_reason": told.finish, "logprobs": None}
        wanted = asked.get("logprobs")
        if self.kind in ("vllm", "sglang"):
            choice["token_ids"] = told.ids
            choice["stop_reason" if self.kind == "vllm" else "matched_stop"] = told.stop
        if self.kind == "vllm" and wanted is not None:
            tops = {f"token_id:{10 + at}": -1.0 - at for at in range(wanted)}
            choice["logprobs"] = {
                "tokens": [f"token_id:{id}" for id in told.ids],
                "token_logprobs": [-2.5] * len(told.ids),
                "top_logprobs": [{f"token_id:{id}": -2.5, **tops} for id in told.ids],
            }
        if self.kind == "llamacpp":
            content = [
                {
                    "id": id,
                    "token": "",
                    "logprob": -2.5,
                    "top_logprobs": [{"id": 10, "logprob": -1}],
                }
                for id in told.ids
            ]
            choice["logprobs"] = {"content": content}
        return {"choices": [choice]}


async def serve(service, port=0, tls=None):
    server = await asyncio.start_server(service.connected, "127.0.0.1", port, ssl=tls)
    return server, server.sockets[0].getsockname()[1]


async def _main() -> None:
    model = FakeModel(float(sys.argv[2]) / 1000, slow_while=sys.argv[3])
    server, bound = await serve(FakeOpenAi(model), int(sys.argv[1]))
    print(f"listening on 127.0.0.1:{bound}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main())
