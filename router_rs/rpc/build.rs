//! Generates clients and servers over the messages of `kvmesh-wire`.

use std::{error::Error, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    println!("cargo:rerun-if-changed={}", root.display());
    let files = protox::Compiler::new([&root])?
        .include_source_info(true)
        .include_imports(true)
        .open_files([
            "kvmesh/v1/inference.proto",
            "kvmesh/v1/worker.proto",
            "kvmesh/v1/admin.proto",
        ])?
        .file_descriptor_set();
    tonic_prost_build::configure()
        .extern_path(".kvmesh.v1", "::kvmesh_wire::v1")
        .compile_fds(files)?;
    Ok(())
}
