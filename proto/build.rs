//! Generates Rust from the `.proto` files with protox, so that no `protoc` has to be installed.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let files = ["proto/csi.proto", "proto/guest.proto", "proto/agent.proto", "proto/ttrpc.proto"];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    // Its `Debug` is by hand: no key ever in a log.
    tonic_prost_build::configure().skip_debug(["zpod.guest.v1.ProvideKeyRequest"]).compile_fds(descriptors)?;
    Ok(())
}
