//! The rules, each broken in every way there is: taken away, leading elsewhere, with one thing left undone, with a
//! condition or an epoch that is wrong.

use vmig::switchover::table::{Do, If, ROWS, Row};
use vmig::switchover::{PHASES, Phase};

/// One way to break one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    Gone,
    LeadsTo(Phase),
    Leaves(usize),
    Accepts(If),
    OtherEpoch(usize),
}

#[derive(Clone, Copy, Debug)]
pub struct Mutant {
    pub row: usize,
    pub damage: Damage,
}

/// All of them, in a fixed order.
pub fn all() -> Vec<Mutant> {
    let mut found = Vec::new();
    for (row, rule) in ROWS.iter().enumerate() {
        let mut add = |damage| found.push(Mutant { row, damage });
        add(Damage::Gone);
        PHASES.iter().filter(|p| rule.to != Some(**p)).for_each(|p| add(Damage::LeadsTo(*p)));
        (0..rule.then.len()).for_each(|n| add(Damage::Leaves(n)));
        (0..rule.then.len())
            .filter(|n| other_epoch(rule.then[*n]).is_some())
            .for_each(|n| add(Damage::OtherEpoch(n)));
        let weaker: &[If] = match rule.when {
            If::Always => &[],
            If::Exact => &[If::Epoch, If::Always],
            If::Epoch | If::New => &[If::Always],
        };
        weaker.iter().for_each(|when| add(Damage::Accepts(*when)));
    }
    found
}

fn other_epoch(what: Do) -> Option<Do> {
    let other = |n: u64| if n == 0 { 1 } else { n - 1 };
    match what {
        Do::Release(n) => Some(Do::Release(other(n))),
        Do::Reacquire(n) => Some(Do::Reacquire(other(n))),
        Do::Fence(n) => Some(Do::Fence(other(n))),
        Do::Own(n) => Some(Do::Own(other(n))),
        _ => None,
    }
}

impl Mutant {
    pub fn rules(self) -> Vec<Row> {
        let mut rules = ROWS.to_vec();
        let row = &mut rules[self.row];
        match self.damage {
            Damage::Gone => drop(rules.remove(self.row)),
            Damage::LeadsTo(phase) => row.to = Some(phase),
            Damage::Accepts(when) => row.when = when,
            Damage::Leaves(n) => {
                let mut then = row.then.to_vec();
                then.remove(n);
                row.then = then.leak();
            }
            Damage::OtherEpoch(n) => {
                let mut then = row.then.to_vec();
                then[n] = other_epoch(then[n]).unwrap_or(then[n]);
                row.then = then.leak();
            }
        }
        rules
    }

    /// The row and what was done to it, in words.
    pub fn name(self) -> String {
        let row = &ROWS[self.row];
        let at = row.at.map_or("any".into(), |at| format!("{at:?}"));
        let what = match self.damage {
            Damage::Gone => "gone".into(),
            Damage::LeadsTo(phase) => format!("leads to {phase:?}"),
            Damage::Leaves(n) => format!("without {:?}", row.then[n]),
            Damage::Accepts(when) => format!("accepts {when:?}"),
            Damage::OtherEpoch(n) => format!("{:?} with another epoch", row.then[n]),
        };
        format!("{at}, {:?}: {what}", row.on)
    }
}
