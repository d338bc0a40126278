//! The one place where other programs are run: found beforehand, no shell,
//! a deadline each, and failures that carry the command and what it said.

use std::{
    env,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::{Error, Result};

/// How often a running program is looked at.
const POLL: Duration = Duration::from_millis(5);
/// How much of a failed program's words goes into the error.
const TAIL: usize = 4096;

/// The absolute path of a program, from `PATH` and the system directories
/// (root's tools are not on everybody's `PATH`).
///
/// # Errors
/// [`Error::MissingTool`].
pub fn find(name: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|candidate| candidate.is_absolute() && candidate.is_file())
        .ok_or_else(|| Error::MissingTool(name.to_owned()))
}

/// Runs a program and returns its standard output.
///
/// # Errors
/// It can't be started, fails, or exceeds `deadline`.
pub fn output(command: &mut Command, deadline: Duration) -> Result<Vec<u8>> {
    let words = describe(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(Error::io("start", command.get_program()))?;
    // Both pipes are drained while it runs, or a full one would block it.
    let (stdout, stderr) = (drain(child.stdout.take()), drain(child.stderr.take()));
    let status = wait(&mut child, &words, deadline)?;
    let (stdout, stderr) = (stdout.join().unwrap_or_default(), stderr.join().unwrap_or_default());
    check(status, words, &stderr).map(|()| stdout)
}

/// Runs a long program with both its outputs in the file `log`.
///
/// # Errors
/// As for [`output`]; the error carries the end of the log.
pub fn logged(command: &mut Command, log: &Path, deadline: Duration) -> Result<()> {
    let words = describe(command);
    let file = File::create(log).map_err(Error::io("create", log))?;
    let again = file.try_clone().map_err(Error::io("open", log))?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(again)
        .spawn()
        .map_err(Error::io("start", command.get_program()))?;
    let status = wait(&mut child, &words, deadline)?;
    check(status, words, &fs::read(log).map_err(Error::io("read", log))?)
}

/// Text for a `stdout` that is known to be text.
pub(crate) fn text(stdout: Vec<u8>) -> String {
    String::from_utf8_lossy(&stdout).into_owned()
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // A read error ends the output; the exit status tells the rest.
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

fn wait(child: &mut Child, words: &str, deadline: Duration) -> Result<ExitStatus> {
    let started = Instant::now();
    let failed = |source: io::Error| Error::Io { action: "wait for", path: PathBuf::from(words), source };
    loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            return Ok(status);
        }
        if started.elapsed() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            return Err(Error::Deadline { command: words.to_owned(), deadline });
        }
        thread::sleep(POLL);
    }
}

fn check(status: ExitStatus, command: String, stderr: &[u8]) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    let tail = &stderr[stderr.len().saturating_sub(TAIL)..];
    Err(Error::Failed { command, status: status.to_string(), stderr: String::from_utf8_lossy(tail).trim().to_owned() })
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_carries_command_status_and_stderr() {
        let error =
            output(Command::new(find("ls").unwrap()).arg("/does/not/exist"), Duration::from_secs(10)).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("ls /does/not/exist") && text.contains("exit status: 2") && text.contains("No such file"),
            "{text}"
        );
    }

    #[test]
    fn a_program_past_its_deadline_is_killed() {
        let started = Instant::now();
        let result = output(Command::new(find("sleep").unwrap()).arg("60"), Duration::from_millis(50));
        assert!(matches!(result, Err(Error::Deadline { .. })));
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_missing_program_is_named_with_the_remedy() {
        let text = find("zpod-no-such-tool").unwrap_err().to_string();
        assert!(text.contains("zpod-no-such-tool") && text.contains("setup.sh"), "{text}");
    }
}
