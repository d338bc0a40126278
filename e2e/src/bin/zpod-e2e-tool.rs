//! Runs inside test containers.
//!
//! * `e2e append FILE`: appends numbered records for ever, each made durable by `fdatasync` before its number is
//!   printed: a number that was seen outside is a promise.
//! * `e2e check FILE`: prints how many records there are from the first on, whole and in order.
//! * `e2e fill FILE BYTES`: writes incompressible bytes until there are so many, or the volume is full; prints how many
//!   were written.
//! * `e2e sync FILE COUNT`: writes so many blocks of 4 KiB, each made durable by `fdatasync` before the next; prints the
//!   nanoseconds each took.
//! * `e2e write FILE MIB`, `e2e read FILE`: one after the other, a MiB at a time, the written ones incompressible and
//!   durable in the end; print the nanoseconds all of it took.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, BufWriter, Read as _, Write as _};
use std::time::Instant;

/// Long enough to cross block boundaries, short enough for many a second.
const RECORD: usize = 200;

fn main() -> io::Result<()> {
    let args: Vec<_> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["append", file] => append(file),
        ["check", file] => check(file),
        ["fill", file, bytes] => fill(file, bytes.parse().map_err(io::Error::other)?),
        ["sync", file, count] => sync(file, count.parse().map_err(io::Error::other)?),
        ["write", file, mib] => write(file, mib.parse().map_err(io::Error::other)?),
        ["read", file] => read(file),
        _ => Err(io::Error::other(
            "append FILE | check FILE | fill FILE BYTES | sync FILE COUNT | write FILE MIB | read FILE",
        )),
    }
}

fn record(number: u64) -> String {
    let start = format!("{number:020} ");
    let filling = (b'a' + (number % 26) as u8) as char;
    format!("{start}{}\n", filling.to_string().repeat(RECORD - start.len() - 1))
}

fn append(file: &str) -> io::Result<()> {
    let mut out = File::options().append(true).create(true).open(file)?;
    for number in 0.. {
        out.write_all(record(number).as_bytes())?;
        out.sync_data()?;
        // Standard output is line-buffered: one write a line.
        println!("{number}");
    }
    Ok(())
}

fn check(file: &str) -> io::Result<()> {
    let mut number = 0;
    for line in BufReader::new(File::open(file)?).lines() {
        if line? + "\n" != record(number) {
            break;
        }
        number += 1;
    }
    println!("{number}");
    Ok(())
}

/// xorshift64*: no need for more than that compressors find nothing in it.
fn fill(file: &str, bytes: u64) -> io::Result<()> {
    let file = File::create(file)?;
    let mut out = BufWriter::with_capacity(1 << 20, &file);
    let (mut state, mut written) = (0x9e37_79b9_7f4a_7c15_u64, 0);
    while written < bytes {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let word = state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
        if let Err(error) = out.write_all(&word) {
            return full(&file, error);
        }
        written += word.len() as u64;
    }
    out.flush().or_else(|error| full(&file, error))?;
    file.sync_all().or_else(|error| full(&file, error))?;
    println!("{}", file.metadata()?.len());
    Ok(())
}

fn full(file: &File, error: io::Error) -> io::Result<()> {
    if !matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
        return Err(error);
    }
    println!("{}", file.metadata()?.len());
    Ok(())
}

/// Made beforehand: in emulation that takes longer than writing it.
fn noise(bytes: usize) -> io::Result<Vec<u8>> {
    let mut noise = vec![0; bytes];
    File::open("/dev/urandom")?.read_exact(&mut noise)?;
    Ok(noise)
}

fn sync(file: &str, count: usize) -> io::Result<()> {
    let (mut out, noise) = (File::create(file)?, noise(4096 * count)?);
    for block in noise.chunks(4096) {
        let begun = Instant::now();
        out.write_all(block)?;
        out.sync_data()?;
        println!("{}", begun.elapsed().as_nanos());
    }
    Ok(())
}

fn write(file: &str, mib: usize) -> io::Result<()> {
    let (mut out, noise) = (File::create(file)?, noise(1 << 20)?);
    let begun = Instant::now();
    for _ in 0..mib {
        out.write_all(&noise)?;
    }
    out.sync_all()?;
    println!("{}", begun.elapsed().as_nanos());
    Ok(())
}

fn read(file: &str) -> io::Result<()> {
    let (mut file, mut buffer) = (File::open(file)?, vec![0; 1 << 20]);
    let begun = Instant::now();
    while file.read(&mut buffer)? > 0 {}
    println!("{}", begun.elapsed().as_nanos());
    Ok(())
}
