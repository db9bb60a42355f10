//! Nothing that a caller asks for is lost: each field of both `Generate`, one at a time and with a
//! value that is no default, changes the request that is made of it, or is refused by its name, or
//! is one of those of which docs/vllm-grpc.md says that they have no effect.
#![allow(clippy::unwrap_used)]

use kvmesh_wire::{
    FOREIGN_DESCRIPTOR_SET,
    vllm::{GenerateRequest as OfInference, grpc::engine::GenerateRequest as OfEngine},
};
use prost::{
    Message,
    encoding::{WireType, encode_key, encode_varint},
};
use prost_types::{
    DescriptorProto, FieldDescriptorProto, FileDescriptorSet, field_descriptor_proto::Type,
};

use super::{engine_ask, inference_ask, open::Asked};
use crate::error::RequestError;

/// A field by its path, and a message that has it alone.
type One = (String, Vec<u8>);

/// Messages by their full names, with those within them.
fn messages() -> Vec<(String, DescriptorProto)> {
    fn of(prefix: &str, message: DescriptorProto, all: &mut Vec<(String, DescriptorProto)>) {
        let name = format!("{prefix}.{}", message.name());
        for nested in &message.nested_type {
            of(&name, nested.clone(), all);
        }
        all.push((name, message));
    }
    let mut all = Vec::new();
    for file in FileDescriptorSet::decode(FOREIGN_DESCRIPTOR_SET)
        .unwrap()
        .file
    {
        for message in file.message_type {
            of(
                &format!(".{}", file.package.clone().unwrap()),
                message,
                &mut all,
            );
        }
    }
    all
}

/// Each field of a message, and each of the messages within it.
fn fields(all: &[(String, DescriptorProto)], name: &str, path: &str) -> Vec<One> {
    let found = all.iter().find(|(known, _)| known == name);
    let Some((_, message)) = found else {
        return Vec::new();
    };
    let mut ones = Vec::new();
    for field in &message.field {
        let path = match path {
            "" => field.name().to_owned(),
            path => format!("{path}.{}", field.name()),
        };
        if field.r#type() != Type::Message {
            ones.push((path, scalar(field)));
            continue;
        }
        // What is known of no message of these files is some JSON.
        let mut within = match field.type_name() == ".google.protobuf.Struct" {
            true => Vec::new(),
            false => fields(all, field.type_name(), &path),
        };
        let entry = field.type_name().ends_with("Entry");
        match within.is_empty() {
            true => ones.push((path, nested(field, &[]))),
            false if entry => {
                let both = within.iter().flat_map(|(_, bytes)| bytes.clone());
                ones.push((path, nested(field, &both.collect::<Vec<u8>>())));
            }
            false => {
                for (_, bytes) in &mut within {
                    *bytes = nested(field, bytes);
                }
                ones.extend(within);
            }
        }
    }
    ones
}

fn scalar(field: &FieldDescriptorProto) -> Vec<u8> {
    let number = u32::try_from(field.number()).unwrap();
    let mut bytes = Vec::new();
    match field.r#type() {
        Type::Float => {
            encode_key(number, WireType::ThirtyTwoBit, &mut bytes);
            bytes.extend(0.5_f32.to_le_bytes());
        }
        Type::Double => {
            encode_key(number, WireType::SixtyFourBit, &mut bytes);
            bytes.extend(0.5_f64.to_le_bytes());
        }
        Type::String | Type::Bytes => {
            encode_key(number, WireType::LengthDelimited, &mut bytes);
            bytes.extend([1, b'x']);
        }
        kind => {
            encode_key(number, WireType::Varint, &mut bytes);
            // What may be left out is true where it is.
            let flag = u64::from(!field.proto3_optional());
            encode_varint(if kind == Type::Bool { flag } else { 3 }, &mut bytes);
        }
    }
    bytes
}

fn nested(field: &FieldDescriptorProto, inner: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let number = u32::try_from(field.number()).unwrap();
    encode_key(number, WireType::LengthDelimited, &mut bytes);
    encode_varint(inner.len() as u64, &mut bytes);
    bytes.extend(inner);
    bytes
}

/// All that is made of a call, but for how its answer looks.
fn told(asked: Result<Asked, RequestError>) -> Result<String, String> {
    let one = |asked: Asked| {
        let Asked {
            request_id,
            model,
            request,
            n,
            prompt_ids,
            ..
        } = asked;
        format!("{request_id} {model} {request:?} {n} {prompt_ids}")
    };
    asked.map(one).map_err(|error| error.to_string())
}

/// Walks all fields; `quiet` are those that may change nothing, of which none may do so
/// unlisted.
fn walk(name: &str, quiet: &[&str], ask: impl Fn(&[u8]) -> Result<String, String>) {
    let all = fields(&messages(), name, "");
    assert!(all.len() > 25, "{all:?}");
    let plain = ask(&[]).unwrap();
    let mut lost = Vec::new();
    for (path, bytes) in &all {
        match ask(bytes) {
            Ok(asked) if asked == plain => lost.push(path.as_str()),
            Ok(_) => {}
            Err(error) => {
                // Of a message within, the message itself may be what is refused.
                let mut named = path.as_str();
                while !error.contains(named) {
                    named = named
                        .rsplit_once('.')
                        .unwrap_or_else(|| panic!("{path}: {error}"))
                        .0;
                }
            }
        }
    }
    assert_eq!(lost, quiet);
}

#[test]
fn each_field_of_an_engine_is_taken_or_refused() {
    let quiet = [
        // No tokeniser of ours puts any.
        "sampling_params.spaces_between_special_tokens",
        // It always does.
        "sampling_params.grammar_from_first_token",
        // How the answer looks.
        "stream",
    ];
    walk(".vllm.grpc.engine.GenerateRequest", &quiet, |bytes| {
        let request = OfEngine::decode(bytes).unwrap();
        told(engine_ask::ask(request, String::new()))
    });
}

#[test]
fn each_field_of_inference_is_taken_or_refused() {
    let quiet = [
        // Without log-probabilities of the prompt, which are refused, there is none to tell.
        "response.prompt_candidates.top_n",
        "response.prompt_candidates.token_ids.ids",
        "response.prompt_candidates.all",
        // How the answer looks.
        "response.output_token_ids",
        // All are tried beside it.
        "response.output_logprobs",
        // None of ours is watermarked.
        "watermarking",
        // Advice: it changes no token.
        "kv_hints",
    ];
    let ask = |bytes: &[u8], output_logprobs| {
        let mut request = OfInference::decode(bytes).unwrap();
        let response = request.response.get_or_insert_default();
        response.output_logprobs = output_logprobs;
        told(inference_ask::ask(request, String::new(), true))
    };
    assert_ne!(ask(&[], true), ask(&[], false));
    walk(".vllm.GenerateRequest", &quiet, |bytes| ask(bytes, true));
}
