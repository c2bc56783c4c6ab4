"""The Flower ClientApp: Flower messages in and out of the client handler."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client_app.handler import handle
from wire.grid import partition_record, record_to_instruction, report_to_record

app = ClientApp()


@app.query()
def who(message: Message, context: Context) -> Message:
    """Say which partition of the data this client holds."""
    return Message(content=partition_record(int(context.node_config["partition-id"])), reply_to=message)


@app.train()
@app.evaluate()
def work(message: Message, context: Context) -> Message:
    """Carry out one instruction."""
    return Message(content=report_to_record(handle(record_to_instruction(message.content))), reply_to=message)
