//! Generates Rust from the `.proto` files with protox, so that no `protoc` has to be installed.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let guest = "proto/guest.proto";
    let others = ["proto/csi.proto", "proto/agent.proto", "proto/ttrpc.proto"];
    for file in others.into_iter().chain([guest]) {
        println!("cargo:rerun-if-changed={file}");
    }
    tonic_prost_build::configure().compile_fds(protox::compile(others, ["proto"])?)?;
    tonic_prost_build::configure()
        // Its `Debug` is by hand: no key ever in a log.
        .skip_debug(["zpod.guest.v1.ProvideKeyRequest"])
        // What the other side can make this one allocate is bounded before prost decodes.
        .codec_path("crate::bounded::BoundedCodec")
        .compile_fds(protox::compile([guest], ["proto"])?)?;
    Ok(())
}
