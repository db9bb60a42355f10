//! Compiles `proto/` with protox: no system protoc is needed.

use std::{error::Error, path::PathBuf};

use prost::Message;
use prost_types::FileDescriptorSet;

const FILES: [&str; 4] = [
    "kvmesh/v1/inference.proto",
    "kvmesh/v1/worker.proto",
    "kvmesh/v1/transfer.proto",
    "kvmesh/v1/admin.proto",
];

/// Wires of others, which a router speaks besides.
const FOREIGN: [&str; 3] = [
    "vllm/engine.proto",
    "vllm/inference.proto",
    "vllm/control.proto",
];

/// Messages that also have a protobuf JSON form: what is written to etcd.
const JSON_MESSAGES: [&str; 6] = [
    ".kvmesh.v1.WorkerRecord",
    ".kvmesh.v1.ModelRecord",
    ".kvmesh.v1.Capabilities",
    ".kvmesh.v1.KvCompatibility",
    ".kvmesh.v1.StepModel",
    ".kvmesh.v1.Role",
];

/// Reflection needs the descriptors, but not the comments.
fn bare(files: &FileDescriptorSet) -> Vec<u8> {
    let mut bare = files.clone();
    for file in &mut bare.file {
        file.source_code_info = None;
    }
    bare.encode_to_vec()
}

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    println!("cargo:rerun-if-changed={}", root.display());
    let out = PathBuf::from(std::env::var("OUT_DIR")?);

    let compile = |files: &[&str]| -> Result<FileDescriptorSet, protox::Error> {
        Ok(protox::Compiler::new([&root])?
            .include_source_info(true)
            .include_imports(true)
            .open_files(files)?
            .file_descriptor_set())
    };
    let foreign = compile(&FOREIGN)?;
    std::fs::write(out.join("foreign.bin"), bare(&foreign))?;
    prost_build::Config::new()
        .bytes(["."])
        .compile_fds(foreign)?;

    let files = compile(&FILES)?;
    let bare = bare(&files);
    std::fs::write(out.join("descriptors.bin"), &bare)?;

    prost_build::Config::new().bytes(["."]).compile_fds(files)?;
    pbjson_build::Builder::new()
        .register_descriptors(&bare)?
        .ignore_unknown_fields()
        .build(&JSON_MESSAGES)?;
    Ok(())
}
