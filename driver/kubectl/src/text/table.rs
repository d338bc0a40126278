use std::io::Write as _;

use tabwriter::TabWriter;

use super::one_line;

/// Columns as kubectl has them: headers in capitals, three spaces between.
pub(crate) fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut writer = TabWriter::new(Vec::new()).padding(3);
    let mut line = |cells: Vec<String>| {
        let cells: Vec<_> = cells.iter().map(|cell| one_line(cell)).collect();
        // Into memory: that does not fail.
        let _ = writeln!(writer, "{}", cells.join("\t"));
    };
    line(header.iter().map(|cell| (*cell).to_owned()).collect());
    rows.into_iter().for_each(&mut line);
    let bytes = writer.into_inner().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    text.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_no_cell_breaks_out() {
        let rows = [["a", "1"], ["longer", "2"], ["e\tvil\n", "\u{1b}[2J"]];
        let text = table(&["NAME", "N"], rows.map(|row| row.map(str::to_owned).to_vec()));
        assert_eq!(text, "NAME     N\na        1\nlonger   2\ne vil     [2J\n");
    }
}
