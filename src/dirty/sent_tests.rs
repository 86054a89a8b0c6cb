//! A source, a connection that breaks, and a destination, as drawn by proptest: pages are numbers, and what is under way is
//! a queue. What is real is the bookkeeping: the dirty bits and [`Sent`].

use std::collections::{HashSet, VecDeque};

use proptest::prelude::*;

use super::*;

const PAGES: usize = 150;

#[derive(Clone, Copy, Debug)]
enum Move {
    /// The guest writes a page.
    Write(usize),
    /// Dirty pages are taken and written to the connection.
    Send(usize),
    /// A point, if none is under way.
    Point,
    /// So much arrives at the destination.
    Arrive(usize),
    /// The acknowledgements so far arrive at the source.
    Hear,
    /// The connection breaks, perhaps within a page; the source goes on over another.
    Cut(bool),
}

enum Thing {
    Page(usize, u64),
    Point(u64),
}

struct World {
    source: Vec<u64>,
    there: Vec<u64>,
    dirty: Bitmap,
    sent: Sent,
    wire: VecDeque<Thing>,
    answers: Vec<u64>,
    /// Pages sent since the last point that the source knows of, as the test counts them.
    doubtful: [HashSet<usize>; 2],
    resent: Vec<(usize, usize)>,
}

impl World {
    fn new() -> World {
        let dirty = Bitmap::new(PAGES).unwrap();
        dirty.set_range(0, PAGES);
        World {
            source: vec![1; PAGES],
            there: vec![0; PAGES],
            dirty,
            sent: Sent::new([PAGES].into_iter()).unwrap(),
            wire: VecDeque::new(),
            answers: Vec::new(),
            doubtful: [HashSet::new(), HashSet::new()],
            resent: Vec::new(),
        }
    }

    fn send(&mut self, most: usize) -> bool {
        let mut taken = Vec::new();
        self.dirty.take_runs(&mut Scan::default(), most.max(1), |first, pages| taken.push((first, pages)));
        for (first, pages) in &taken {
            self.sent.mark(0, *first, *pages, *pages as u64);
            for page in *first..first + pages {
                self.doubtful[1].insert(page);
                self.wire.push_back(Thing::Page(page, self.source[page]));
            }
        }
        !taken.is_empty()
    }

    fn arrive(&mut self, count: usize) {
        for _ in 0..count {
            match self.wire.pop_front() {
                Some(Thing::Page(page, value)) => self.there[page] = value,
                Some(Thing::Point(number)) => self.answers.push(number),
                None => return,
            }
        }
    }

    fn hear(&mut self) {
        for number in std::mem::take(&mut self.answers) {
            if self.sent.awaited() == Some(number) {
                self.doubtful[0].clear();
            }
            self.sent.acknowledge(number);
        }
    }

    fn go(&mut self, what: Move) {
        match what {
            Move::Write(page) => {
                self.source[page] += 1;
                self.dirty.set_range(page, 1);
            }
            Move::Send(most) => drop(self.send(most)),
            Move::Point => {
                if let Some(number) = self.sent.number() {
                    let since = std::mem::take(&mut self.doubtful[1]);
                    self.doubtful[0].extend(since);
                    self.wire.push_back(Thing::Point(number));
                }
            }
            Move::Arrive(count) => self.arrive(count),
            Move::Hear => self.hear(),
            Move::Cut(torn) => {
                if let (true, Some(Thing::Page(page, _))) = (torn, self.wire.front()) {
                    self.there[*page] = u64::MAX;
                }
                self.wire.clear();
                self.answers.clear();
                let before = self.dirty.count();
                let doubtful = self.doubtful.iter_mut().flat_map(|set| set.drain()).collect::<HashSet<_>>().len();
                let dirty = &self.dirty;
                self.sent.give_back(|_, first, pages| {
                    dirty.set_range(first, pages);
                });
                self.resent.push((self.dirty.count(), before + doubtful));
            }
        }
    }
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        6 => (0..PAGES).prop_map(Move::Write),
        6 => (1..PAGES).prop_map(Move::Send),
        3 => Just(Move::Point),
        5 => (1..PAGES).prop_map(Move::Arrive),
        3 => Just(Move::Hear),
        2 => any::<bool>().prop_map(Move::Cut),
    ];
    prop::collection::vec(one, 1..200)
}

proptest! {
    #[test]
    fn nothing_is_lost_and_no_more_is_sent_again_than_is_in_doubt(moves in moves()) {
        let mut world = World::new();
        moves.into_iter().for_each(|what| world.go(what));
        while world.send(PAGES) {}
        world.arrive(usize::MAX);
        prop_assert_eq!(&world.there, &world.source);
        for (pending, most) in &world.resent {
            prop_assert!(pending <= most, "{} pages are pending after a resume, {} at most may be", pending, most);
        }
    }
}

#[test]
fn an_answer_to_another_point_says_nothing() {
    let mut sent = Sent::new([10].into_iter()).unwrap();
    sent.mark(0, 3, 2, 2);
    assert_eq!((sent.since(), sent.number(), sent.number(), sent.since()), (2, Some(1), None, 0));
    sent.mark(0, 9, 1, 1);
    let left = |sent: &mut Sent| {
        let mut left = Vec::new();
        sent.give_back(|_, first, pages| left.push((first, pages)));
        left
    };
    sent.acknowledge(0);
    sent.acknowledge(2);
    assert_eq!(sent.awaited(), Some(1));
    sent.acknowledge(1);
    assert_eq!((sent.awaited(), left(&mut sent), left(&mut sent)), (None, vec![(9, 1)], vec![]));
    // Numbers go on over the next connection.
    assert_eq!(sent.number(), Some(2));
    sent.acknowledge(1);
    assert_eq!(sent.awaited(), Some(2));
}
