"""A tool parser for a model that knows no tools: vLLM loads it with `--tool-parser-plugin`."""

from __future__ import annotations

import json

from vllm.entrypoints.generate.base.protocol import ExtractedToolCallInformation, FunctionCall, ToolCall
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager


@ToolParserManager.register_module("asked_for")
class AskedFor(ToolParser):
    """Whatever the model says is the argument of a call, if the last message of the user asks for one."""

    def extract_tool_calls(self, model_output: str, request: ChatCompletionRequest) -> ExtractedToolCallInformation:
        last = request.messages[-1]
        if last["role"] != "user" or "Call" not in str(last["content"]):
            return ExtractedToolCallInformation(tools_called=False, tool_calls=[], content=model_output)
        function = FunctionCall(name="add", arguments=json.dumps({"a": model_output}))
        return ExtractedToolCallInformation(tools_called=True, tool_calls=[ToolCall(function=function)], content=None)
