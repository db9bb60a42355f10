"""The compatibility check finds what it is there for."""

import pytest
from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from proto_compatibility import differences

OLD = """
file {
  name: "a.proto" package: "p" syntax: "proto3"
  message_type {
    name: "M"
    field { name: "a" number: 1 type: TYPE_INT32 label: LABEL_OPTIONAL }
    field { name: "b" number: 2 type: TYPE_STRING label: LABEL_REPEATED }
  }
  enum_type { name: "E" value { name: "ZERO" number: 0 } value { name: "ONE" number: 1 } }
  service { name: "S" method { name: "Do" input_type: ".p.M" output_type: ".p.M" } }
}
"""


def parse(text: str) -> FileDescriptorSet:
    return text_format.Parse(text, FileDescriptorSet())


def test_equal_and_grown_protos_are_compatible():
    grown = OLD.replace('name: "M"', 'name: "M" field { name: "c" number: 9 type: TYPE_BOOL }')
    assert differences(parse(OLD), parse(OLD)) == []
    assert differences(parse(OLD), parse(grown)) == []


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('"a" number: 1', '"a" number: 3', "p.M.a = 1 is gone"),
        ('"a" number: 1', '"z" number: 1', "now called z"),
        ("TYPE_INT32", "TYPE_INT64", "another type"),
        ("LABEL_REPEATED", "LABEL_OPTIONAL", "repeated"),
        ('name: "M"', 'name: "N"', "message p.M is gone"),
        ('name: "ONE" number: 1', 'name: "UNO" number: 1', "E.ONE = 1"),
        ('name: "Do"', 'name: "Undo"', "method p.S/Do is gone"),
        ('output_type: ".p.M"', 'output_type: ".p.M" server_streaming: true', "something else"),
        ("label: LABEL_OPTIONAL", "label: LABEL_OPTIONAL proto3_optional: true", "presence"),
    ],
)
def test_each_break_is_named(before, after, said):
    found = differences(parse(OLD), parse(OLD.replace(before, after, 1)))
    assert any(said in line for line in found), found
