"""A server that speaks OpenEnv's protocol without its package: one session at a time, and numbers that are to be added up.

ACTION=text asks for one field of text, otherwise an action is an object with a number and a comment.
"""

from __future__ import annotations

import os
import random

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect


TEXT = {"properties": {"metadata": {"type": "object"}, "message": {"type": "string"}}, "required": ["message"]}
OBJECT = {"properties": {"number": {"type": "integer"}, "comment": {"type": "string"}}, "required": ["number"]}
IS_TEXT = os.environ.get("ACTION") == "text"
MAX_STEPS = 3

open_sessions: list[WebSocket] = []


async def schema(request: Request) -> JSONResponse:
    return JSONResponse({"action": TEXT if IS_TEXT else OBJECT, "observation": {}, "state": {}})


def error(code: str, message: str) -> dict:
    return {"type": "error", "data": {"code": code, "message": message}}


async def session(socket: WebSocket) -> None:
    await socket.accept()
    if open_sessions:
        await socket.receive_json()
        await socket.send_json(error("CAPACITY_REACHED", "one session at a time"))
        await socket.close()
        return
    open_sessions.append(socket)
    secret = steps = 0
    try:
        while True:
            message = await socket.receive_json()
            data = message["data"]
            if message["type"] == "reset":
                secret, steps = random.Random(data["seed"]).randint(1, 9), 0
                result = {"observation": {"text": f"Say {secret}.", "done": False}, "reward": None, "done": False}
            elif not IS_TEXT and not isinstance(data.get("number"), int):
                await socket.send_json(error("VALIDATION_ERROR", "number: an integer is required"))
                continue
            elif data.get("comment") == "break":
                await socket.send_json(error("EXECUTION_ERROR", "it broke"))
                continue
            else:
                steps += 1
                is_right = str(secret) in data["message"] if IS_TEXT else data["number"] == secret
                done = is_right or steps == MAX_STEPS
                result = {"observation": {"text": "Again."}, "reward": float(is_right), "done": done}
            await socket.send_json({"type": "observation", "data": result})
    except WebSocketDisconnect:
        pass
    finally:
        open_sessions.remove(socket)


app = Starlette(routes=[Route("/schema", schema), WebSocketRoute("/ws", session)])
