//! `zpod-image`: builds guest images, packs archives, appends overlays.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use clap::{Parser, Subcommand};
use zpod_image::{
    Archive, Result, atomic,
    cache::Cache,
    image::{self, Image, Request},
    initrd,
};

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build kernel, overlay and manifest from Debian's packages (needs root once)
    Build {
        /// A static binary for /zpod/init [default: zpod-guest, built now]
        #[arg(long, value_name = "PATH")]
        guest_binary: Option<PathBuf>,
        /// Where the image goes [default: guest-image in the cache]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Another kernel module to ship and load at boot (repeatable)
        #[arg(long = "module", value_name = "NAME")]
        modules: Vec<String>,
    },
    /// Pack a directory into an initramfs archive
    Cpio {
        /// The directory that becomes the root
        #[arg(long, value_name = "DIR")]
        from: PathBuf,
        /// The archive; compressed with zstd if its name ends in .zst
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Append an overlay to a node's initrd
    Append {
        /// The Kata initrd
        #[arg(long, value_name = "INITRD")]
        base: PathBuf,
        /// Our overlay
        #[arg(long, value_name = "FILE")]
        overlay: PathBuf,
        /// The initrd to write
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("zpod-image: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Build { guest_binary, out, modules } => {
            let started = Instant::now();
            let cache = Cache::from_env()?;
            let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
            let request = Request { guest_binary, workspace, extra_modules: modules };
            let image = image::build(&cache, &request)?.install(&out.unwrap_or_else(|| cache.guest_image()))?;
            report(&image, started);
        }
        Task::Cpio { from, out } => {
            let mut archive = Archive::new();
            archive.tree(&from)?;
            let zstd = out.extension().is_some_and(|extension| extension == "zst");
            atomic::write(&out, &if zstd { archive.to_zstd()? } else { archive.to_cpio()? })?;
        }
        Task::Append { base, overlay, out } => {
            let bytes = initrd::append(&base, &overlay, &out)?;
            println!("{} ({})", out.display(), mib(bytes));
        }
    }
    Ok(())
}

fn report(image: &Image, started: Instant) {
    let manifest = &image.manifest;
    println!("{}: Linux {}, in {:.1?}", image.dir.display(), manifest.kernel_release, started.elapsed());
    for (name, output) in &manifest.outputs {
        println!("  {name:<18} {:>10}  sha256 {}", mib(output.bytes), output.sha256);
    }
    println!("  in the overlay, uncompressed ({} in all):", mib(manifest.uncompressed_bytes));
    for (name, bytes) in &manifest.components {
        println!("    {name:<16} {:>10}", mib(*bytes));
    }
}

fn mib(bytes: u64) -> String {
    // Sizes here are far below the 2^52 at which a double loses bytes.
    #[allow(clippy::cast_precision_loss)]
    let mib = bytes as f64 / (1024.0 * 1024.0);
    format!("{mib:.2} MiB")
}
