"""What a change of protos takes away from those who have the old ones.

Allowed: new files, messages, fields, enum values, services and methods; other
comments; a field that is removed with its number reserved is not allowed within
v1, since old senders may rely on it.
"""

from collections.abc import Iterator

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorSet,
)

Messages = dict[str, DescriptorProto]
Enums = dict[str, EnumDescriptorProto]


def differences(old: FileDescriptorSet, new: FileDescriptorSet) -> list[str]:
    """Each thing that was taken away or changed its meaning, in words."""
    return [
        *_of_messages(_messages(old), _messages(new)),
        *_of_enums(_enums(old), _enums(new)),
        *_of_methods(_methods(old), _methods(new)),
    ]


def _messages(files: FileDescriptorSet) -> Messages:
    found: Messages = {}

    def add(message: DescriptorProto, scope: str) -> None:
        name = f"{scope}.{message.name}"
        found[name] = message
        for nested in message.nested_type:
            add(nested, name)

    for file in files.file:
        for message in file.message_type:
            add(message, file.package)
    return found


def _enums(files: FileDescriptorSet) -> Enums:
    found = {f"{file.package}.{enum.name}": enum for file in files.file for enum in file.enum_type}
    for name, message in _messages(files).items():
        found.update({f"{name}.{enum.name}": enum for enum in message.enum_type})
    return found


def _methods(files: FileDescriptorSet) -> dict[str, tuple[str, str, bool, bool]]:
    return {
        f"{file.package}.{service.name}/{method.name}": (
            method.input_type, method.output_type, method.client_streaming, method.server_streaming,
        )
        for file in files.file
        for service in file.service
        for method in service.method
    }  # fmt: skip


def _of_messages(old: Messages, new: Messages) -> Iterator[str]:
    for name, message in old.items():
        if name not in new:
            yield f"message {name} is gone"
            continue
        fields = {field.number: field for field in new[name].field}
        for field in message.field:
            found = fields.get(field.number)
            if found is None:
                yield f"field {name}.{field.name} = {field.number} is gone"
            else:
                yield from _of_field(name, message, field, new[name], found)


def _of_field(
    scope: str,
    old_message: DescriptorProto,
    old: FieldDescriptorProto,
    new_message: DescriptorProto,
    new: FieldDescriptorProto,
) -> Iterator[str]:
    where = f"field {scope}.{old.name} = {old.number}"
    if old.name != new.name:
        # The name is wire format too: etcd's records are JSON.
        yield f"{where} is now called {new.name}"
    if (old.type, old.type_name) != (new.type, new.type_name):
        yield f"{where} has another type"
    if old.label != new.label:
        yield f"{where} is repeated where it was not, or the other way round"
    if _oneof(old_message, old) != _oneof(new_message, new):
        yield f"{where} moved into, out of or between oneofs"
    if old.proto3_optional != new.proto3_optional:
        yield f"{where} has presence where it had not, or the other way round"


def _oneof(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    if not field.HasField("oneof_index") or field.proto3_optional:
        return ""
    return message.oneof_decl[field.oneof_index].name


def _of_enums(old: Enums, new: Enums) -> Iterator[str]:
    for name, enum in old.items():
        if name not in new:
            yield f"enum {name} is gone"
            continue
        names = {value.number: value.name for value in new[name].value}
        for value in enum.value:
            if names.get(value.number) != value.name:
                yield f"enum value {name}.{value.name} = {value.number} is gone or renamed"


def _of_methods(
    old: dict[str, tuple[str, str, bool, bool]], new: dict[str, tuple[str, str, bool, bool]]
) -> Iterator[str]:
    for name, shape in old.items():
        if name not in new:
            yield f"method {name} is gone"
        elif new[name] != shape:
            yield f"method {name} takes or gives something else"
