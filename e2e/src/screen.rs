//! What a demo prints: steps with their times, details below them.

use std::io::{IsTerminal as _, Write as _};
use std::time::Instant;

/// The terminal.
#[derive(Debug)]
pub struct Screen {
    colours: bool,
    terminal: bool,
    begin: Instant,
    step: Instant,
    title: String,
}

const GREEN: &str = "32";
const BLUE: &str = "1;34";
const DIM: &str = "2";
const RED: &str = "1;31";
const BOLD: &str = "1";

impl Screen {
    /// One without anything on it.
    #[expect(clippy::new_without_default, reason = "its clock runs from here")]
    pub fn new() -> Self {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let terminal = std::io::stdout().is_terminal();
        // https://no-color.org; FORCE_COLOR is for pipes that end at a terminal.
        let colours = !set("NO_COLOR") && (set("FORCE_COLOR") || terminal);
        let now = Instant::now();
        Self { colours, terminal, begin: now, step: now, title: String::new() }
    }

    fn paint(&self, colour: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// What it is about.
    pub fn headline(&self, text: &str) {
        println!("{}\n", self.paint(BOLD, text));
    }

    /// Begins a step: on a terminal its title is there while it runs.
    pub fn begin(&mut self, title: &str) {
        self.step = Instant::now();
        self.title = title.to_owned();
        if self.terminal {
            print!("         {} …", self.paint(DIM, title));
            // A terminal that can't be written to shows nothing else either.
            let _ = std::io::stdout().flush();
        }
    }

    /// Ends the step with what came out of it.
    pub fn done(&self, outcome: &str) {
        let time = format!("{:6.2} s", self.step.elapsed().as_secs_f64());
        let start = if self.terminal { "\r\x1b[2K" } else { "" };
        println!("{start}{} {}  {}", self.paint(GREEN, &time), self.paint(BLUE, &self.title), outcome);
    }

    /// More lines about the step.
    pub fn detail(&self, text: &str) {
        for line in text.lines() {
            println!("           {}", self.paint(DIM, line));
        }
    }

    /// The last line, of a demo that went well.
    pub fn finish(&self, text: &str) {
        let time = format!("{:.0} s", self.begin.elapsed().as_secs_f64());
        println!("\n{} {}", self.paint(GREEN, "✔"), self.paint(BOLD, &format!("{text} {time} in all.")));
    }

    /// The last line, of one that didn't.
    pub fn fail(&self, error: &anyhow::Error) {
        println!("\n{} {error:#}", self.paint(RED, &format!("✘ {}:", self.title)));
    }
}
