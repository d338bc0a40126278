//! A full copy of what is in an image, for file systems where files can't share blocks. Holes stay holes. The bytes
//! don't come into this process: the kernel copies them (copy_file_range(2)).

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::image;

/// Copied between two looks at whether to go on.
const STEP: u64 = 16 << 20;

/// Copies what `from` has before `end`. `go_on` is told how much of how much is done, before the first step and after
/// each; what it gives back as an error ends the copy.
pub(super) fn copy<E: From<io::Error>>(
    from: &File,
    to: &File,
    end: u64,
    mut go_on: impl FnMut(u64, u64) -> Result<(), E>,
) -> Result<(), E> {
    image::settle(from, 0, end)?;
    let mut total = 0;
    each_data(from, end, |data| {
        total += data.end - data.start;
        Ok::<(), E>(())
    })?;
    go_on(0, total)?;
    let mut done = 0;
    each_data(from, end, |data| {
        let mut at = data.start;
        while at < data.end {
            let (mut source, mut target) = (at, at);
            let length = usize::try_from((data.end - at).min(STEP)).unwrap_or(usize::MAX);
            let copied = rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), length)
                .map_err(io::Error::from)? as u64;
            if copied == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            at += copied;
            done += copied;
            go_on(done, total)?;
        }
        Ok(())
    })
}

/// Calls `each` with every range before `end` that has data.
fn each_data<E: From<io::Error>>(
    file: &File,
    end: u64,
    mut each: impl FnMut(Range<u64>) -> Result<(), E>,
) -> Result<(), E> {
    let mut at = 0;
    while at < end {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) if start < end => start,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(error) => return Err(io::Error::from(error).into()),
        };
        let hole = rustix::fs::seek(file, SeekFrom::Hole(start)).map_err(io::Error::from)?;
        each(start..hole.min(end))?;
        at = hole;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    const MIB: u64 = 1 << 20;

    fn file(data: &[(u64, u64)]) -> File {
        let file = tempfile::tempfile().unwrap();
        for (at, length) in data {
            file.write_all_at(&vec![7; *length as usize], *at).unwrap();
        }
        file
    }

    #[test]
    fn data_is_copied_and_holes_are_not_filled() {
        let (from, to) = (file(&[(0, 4096), (64 * MIB, 40 * MIB), (200 * MIB, 4096)]), file(&[]));
        let mut told = Vec::new();
        copy(&from, &to, 150 * MIB, |done, total| {
            told.push((done, total));
            Ok::<(), io::Error>(())
        })
        .unwrap();
        let total = 40 * MIB + 4096;
        assert_eq!((told.first(), told.last()), (Some(&(0, total)), Some(&(total, total))));
        assert!(told.windows(2).all(|pair| pair[1].0 > pair[0].0 && pair[1].0 - pair[0].0 <= 64 * MIB), "{told:?}");
        assert!(to.metadata().unwrap().blocks() * 512 < 42 * MIB);
        let mut bytes = [0; 3];
        to.read_exact_at(&mut bytes, 104 * MIB - 3).unwrap();
        assert_eq!((bytes, to.metadata().unwrap().len()), ([7; 3], 104 * MIB));
    }

    #[test]
    fn it_ends_when_it_shall() {
        let (from, to) = (file(&[(0, 40 * MIB)]), file(&[]));
        let stop = |done, _| if done > 0 { Err(io::ErrorKind::Interrupted.into()) } else { Ok::<(), io::Error>(()) };
        assert_eq!(copy(&from, &to, 40 * MIB, stop).unwrap_err().kind(), io::ErrorKind::Interrupted);
        assert!(to.metadata().unwrap().len() < 40 * MIB);
    }
}
