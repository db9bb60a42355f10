//! Compiles the subset of etcd's API with protox: no system protoc is needed.

use std::{error::Error, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?).join("proto");
    println!("cargo:rerun-if-changed={}", root.display());
    let files = protox::Compiler::new([&root])?
        .include_source_info(true)
        .include_imports(true)
        .open_files(["etcd/rpc.proto", "etcd/kv.proto"])?
        .file_descriptor_set();
    tonic_prost_build::configure()
        // Tests answer in etcd's place where a real one cannot be made to.
        .server_mod_attribute(".", "#[cfg(test)]")
        .compile_fds(files)?;
    Ok(())
}
