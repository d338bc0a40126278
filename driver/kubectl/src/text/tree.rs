use super::one_line;
use crate::view::Node;

/// Draws trees one below the other.
pub(crate) fn draw(roots: &[Node]) -> String {
    let mut text = String::new();
    for root in roots {
        text.push_str(&format!("{}\n", one_line(&root.line)));
        below(&root.below, "", &mut text);
    }
    text
}

fn below(nodes: &[Node], indent: &str, text: &mut String) {
    for (at, node) in nodes.iter().enumerate() {
        let last = at + 1 == nodes.len();
        text.push_str(&format!("{indent}{}{}\n", if last { "└─ " } else { "├─ " }, one_line(&node.line)));
        below(&node.below, &format!("{indent}{}", if last { "   " } else { "│  " }), text);
    }
}
