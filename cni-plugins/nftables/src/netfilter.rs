//! Elements of sets and maps, straight from and to the kernel.
//!
//! Rules are text for `nft` ([`Nft`](crate::Nft)) and rarely change; elements come and go with every pod, and a process
//! for each of them would cost more than all the rest. So this speaks the netlink protocol of nftables
//! (`linux/netfilter/nf_tables.h`) as far as elements go: read the ones of a set, and add and delete some in one
//! [`Transaction`], which the kernel takes whole or not at all, and only if nobody has changed the ruleset since the
//! caller looked ([`Netfilter::generation`]).

use std::cell::Cell;
use std::io;
use std::thread::sleep;
use std::time::Duration;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use crate::Family;
use crate::wire::{attribute, attributes, message, messages, put, put_nested, put_text};

/// The kernel builds no larger datagram than 32 KiB.
const RECEIVE_BYTES: usize = 64 * 1024;
/// How often a dump that changes interrupted is read again.
const DUMP_ATTEMPTS: u32 = 50;
/// How often a change is planned anew because others changed the ruleset between look and step. Each time somebody got
/// something done, so this many in a row are a storm.
const ATTEMPTS: u32 = 100;
/// First and longest pause between two of them.
const PAUSE_MIN: Duration = Duration::from_micros(200);
const PAUSE_MAX: Duration = Duration::from_millis(20);
/// Bytes of a comment: the kernel keeps 256 bytes of user data, two of which say what it is, and a zero ends the text.
pub const COMMENT_MAX: usize = 253;

const SUBSYSTEM: u16 = 10;
const MESSAGE_GET_TABLE: u16 = 1;
const MESSAGE_DELETE_TABLE: u16 = 2;
const MESSAGE_GET_CHAIN: u16 = 4;
const MESSAGE_DELETE_CHAIN: u16 = 5;
const MESSAGE_GET_RULE: u16 = 7;
const MESSAGE_DELETE_RULE: u16 = 8;
const MESSAGE_NEW_ELEMENT: u16 = 12;
const MESSAGE_GET_ELEMENT: u16 = 13;
const MESSAGE_DELETE_ELEMENT: u16 = 14;
const MESSAGE_GET_GENERATION: u16 = 16;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const BATCH_GENERATION: u16 = 1;

const ERROR: u16 = 2;
const DONE: u16 = 3;
const FLAG_REQUEST: u16 = 0x1;
const FLAG_ACK: u16 = 0x4;
const FLAG_DUMP: u16 = 0x300;
const FLAG_DUMP_INTERRUPTED: u16 = 0x10;
const FLAG_EXCLUSIVE: u16 = 0x200;
const FLAG_CREATE: u16 = 0x400;

const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_HANDLE: u16 = 3;
const RULE_EXPRESSIONS: u16 = 4;
const EXPRESSION_DATA: u16 = 2;
const IMMEDIATE_DATA: u16 = 2;
const LIST_TABLE: u16 = 1;
const LIST_SET: u16 = 2;
const LIST_ELEMENTS: u16 = 3;
const LIST_ELEMENT: u16 = 1;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_DATA: u16 = 2;
const ELEMENT_USER_DATA: u16 = 6;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;
const VERDICT_JUMP: i32 = -3;
const GENERATION_ID: u16 = 1;
/// User data is a list of type, length, value; this type is the comment.
const USER_DATA_COMMENT: u8 = 0;

/// Why the kernel did not do it.
#[derive(Debug, thiserror::Error)]
#[error("{request}")]
pub struct NetfilterError {
    /// What was asked.
    request: String,
    source: io::Error,
}

impl NetfilterError {
    fn new(request: &str, source: io::Error) -> Self {
        Self { request: request.to_owned(), source }
    }

    fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }

    /// Whether the same may succeed when the caller looks again: others have changed the ruleset in between, so that
    /// something is there already, or gone.
    #[must_use]
    pub fn is_outdated(&self) -> bool {
        matches!(
            self.errno(),
            Some(libc::ERESTART | libc::EEXIST | libc::ENOENT | libc::EBUSY | libc::EAGAIN)
        )
    }

    /// Whether the table, set or chain is missing.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        self.errno() == Some(libc::ENOENT)
    }
}

/// Looks and steps until nobody was in between.
///
/// # Errors
/// That of the attempt; [`NetfilterError::is_outdated`] if the ruleset changes all the time.
pub fn undisturbed<T>(
    mut attempt: impl FnMut() -> Result<T, NetfilterError>,
) -> Result<T, NetfilterError> {
    let mut pause = PAUSE_MIN;
    let mut tries = 1;
    loop {
        match attempt() {
            Err(error) if error.is_outdated() && tries < ATTEMPTS => {
                // Processes that wait differently long do not meet again.
                sleep(pause * (1 + std::process::id() % 4) / 4);
                pause = (pause * 2).min(PAUSE_MAX);
                tries += 1;
            }
            done => return done,
        }
    }
}

/// A rule, as far as it says where packets go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Its number in its table.
    pub handle: u64,
    /// The chain that it jumps or goes to.
    pub chain: Option<String>,
}

/// What an element of a map leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Nothing: the element of a plain set.
    None,
    /// A value, each part filled up with zeros to a multiple of four bytes.
    Value(Vec<u8>),
    /// `jump CHAIN`.
    Jump(String),
}

/// An element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    /// The key, each part filled up with zeros to a multiple of four bytes.
    pub key: Vec<u8>,
    /// What it leads to.
    pub target: Target,
    /// The comment; empty is none.
    pub comment: String,
}

/// Changes to the elements of one table that are made all or none.
#[derive(Debug)]
pub struct Transaction {
    family: u8,
    table: String,
    generation: u32,
    messages: Vec<(u16, u16, Vec<u8>)>,
}

impl Transaction {
    /// An empty one, good for the ruleset of this generation.
    #[must_use]
    pub fn new(family: Family, table: &str, generation: u32) -> Self {
        Self {
            family: family_number(family),
            table: table.to_owned(),
            generation,
            messages: Vec::new(),
        }
    }

    /// Adds an element that must not be there.
    pub fn add(&mut self, set: &str, element: &Element) {
        let flags = FLAG_CREATE | FLAG_EXCLUSIVE;
        let attributes = self.elements(set, |out| put_element(out, element));
        self.messages.push((MESSAGE_NEW_ELEMENT, flags, attributes));
    }

    /// Deletes an element that has to be there.
    pub fn delete(&mut self, set: &str, key: &[u8]) {
        let attributes = self.elements(set, |out| put_key(out, key));
        self.messages.push((MESSAGE_DELETE_ELEMENT, 0, attributes));
    }

    /// Deletes the whole table, rules and all.
    pub fn delete_table(&mut self) {
        let mut attributes = Vec::new();
        put_text(&mut attributes, TABLE_NAME, &self.table);
        self.messages.push((MESSAGE_DELETE_TABLE, 0, attributes));
    }

    /// Deletes a rule.
    pub fn delete_rule(&mut self, chain: &str, handle: u64) {
        let mut attributes = self.chain(RULE_TABLE, RULE_CHAIN, chain);
        put(&mut attributes, RULE_HANDLE, &handle.to_be_bytes());
        self.messages.push((MESSAGE_DELETE_RULE, 0, attributes));
    }

    /// Deletes a chain with its rules; none of other chains may lead to it.
    pub fn delete_chain(&mut self, chain: &str) {
        self.messages.push((MESSAGE_DELETE_RULE, 0, self.chain(RULE_TABLE, RULE_CHAIN, chain)));
        self.messages.push((MESSAGE_DELETE_CHAIN, 0, self.chain(CHAIN_TABLE, CHAIN_NAME, chain)));
    }

    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    fn chain(&self, table_kind: u16, chain_kind: u16, chain: &str) -> Vec<u8> {
        let mut out = Vec::new();
        put_text(&mut out, table_kind, &self.table);
        put_text(&mut out, chain_kind, chain);
        out
    }

    fn elements(&self, set: &str, element: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        put_text(&mut out, LIST_TABLE, &self.table);
        put_text(&mut out, LIST_SET, set);
        put_nested(&mut out, LIST_ELEMENTS, |out| put_nested(out, LIST_ELEMENT, element));
        out
    }

    fn encode(&self) -> Vec<u8> {
        let mut generation = Vec::new();
        put(&mut generation, BATCH_GENERATION, &self.generation.to_be_bytes());
        let mut out = message(BATCH_BEGIN, FLAG_REQUEST, 1, (0, SUBSYSTEM), &generation);
        let last = self.messages.len().saturating_sub(1);
        for (index, (kind, flags, attributes)) in self.messages.iter().enumerate() {
            let ack = if index == last { FLAG_ACK } else { 0 };
            out.extend(message(
                SUBSYSTEM << 8 | kind,
                FLAG_REQUEST | flags | ack,
                2,
                (self.family, 0),
                attributes,
            ));
        }
        out.extend(message(BATCH_END, FLAG_REQUEST, 3, (0, SUBSYSTEM), &[]));
        out
    }
}

fn put_key(out: &mut Vec<u8>, key: &[u8]) {
    put_nested(out, ELEMENT_KEY, |out| put(out, DATA_VALUE, key));
}

fn put_element(out: &mut Vec<u8>, element: &Element) {
    put_key(out, &element.key);
    match &element.target {
        Target::None => {}
        Target::Value(value) => {
            put_nested(out, ELEMENT_DATA, |out| put(out, DATA_VALUE, value));
        }
        Target::Jump(chain) => put_nested(out, ELEMENT_DATA, |out| {
            put_nested(out, DATA_VERDICT, |out| {
                put(out, VERDICT_CODE, &VERDICT_JUMP.to_be_bytes());
                put_text(out, VERDICT_CHAIN, chain);
            });
        }),
    }
    if !element.comment.is_empty() {
        let end = (0..=COMMENT_MAX.min(element.comment.len()))
            .rev()
            .find(|end| element.comment.is_char_boundary(*end))
            .unwrap_or_default();
        let comment = element.comment.get(..end).unwrap_or_default();
        let length = u8::try_from(comment.len() + 1).unwrap_or(u8::MAX);
        let mut data = vec![USER_DATA_COMMENT, length];
        data.extend(comment.as_bytes());
        data.push(0);
        put(out, ELEMENT_USER_DATA, &data);
    }
}

/// `None` if it is no element, or one that ends an interval.
fn parse_element(bytes: &[u8]) -> Option<Element> {
    let key = attribute(attribute(bytes, ELEMENT_KEY)?, DATA_VALUE)?.to_vec();
    let data = attribute(bytes, ELEMENT_DATA);
    let value = data.and_then(|data| attribute(data, DATA_VALUE));
    let chain = data
        .and_then(|data| attribute(attribute(data, DATA_VERDICT)?, VERDICT_CHAIN))
        .map(without_zero);
    let target = match (value, chain) {
        (Some(value), _) => Target::Value(value.to_vec()),
        (None, Some(chain)) => Target::Jump(chain),
        (None, None) => Target::None,
    };
    let comment = attribute(bytes, ELEMENT_USER_DATA).and_then(comment).unwrap_or_default();
    Some(Element { key, target, comment })
}

fn parse_rule(payload: &[u8]) -> Option<Rule> {
    let handle = u64::from_be_bytes(*attribute(payload, RULE_HANDLE)?.first_chunk()?);
    let target = |expression: &[u8]| -> Option<String> {
        let data = attribute(attribute(expression, EXPRESSION_DATA)?, IMMEDIATE_DATA)?;
        let verdict = attribute(data, DATA_VERDICT)?;
        attribute(verdict, VERDICT_CHAIN).map(without_zero)
    };
    let expressions = attribute(payload, RULE_EXPRESSIONS).unwrap_or_default();
    let chain = attributes(expressions).find_map(|(_, expression)| target(expression));
    Some(Rule { handle, chain })
}

fn comment(mut data: &[u8]) -> Option<String> {
    loop {
        let (kind, length) = (*data.first()?, usize::from(*data.get(1)?));
        let value = data.get(2..2 + length)?;
        if kind == USER_DATA_COMMENT {
            return Some(without_zero(value));
        }
        data = data.get(2 + length..)?;
    }
}

fn without_zero(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

fn family_number(family: Family) -> u8 {
    match family {
        Family::Inet => 1,
        Family::Ip => 2,
        Family::Bridge => 7,
        Family::Ip6 => 10,
    }
}

/// A socket to nftables, in the namespace of the thread that opened it.
#[derive(Debug)]
pub struct Netfilter {
    socket: Socket,
    sequence: Cell<u32>,
}

impl Netfilter {
    /// Opens it.
    ///
    /// # Errors
    /// If the system has no socket to give.
    pub fn open() -> Result<Self, NetfilterError> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_NETFILTER)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(socket)
        };
        let socket = open().map_err(|source| NetfilterError::new("open netfilter", source))?;
        Ok(Self { socket, sequence: Cell::new(0) })
    }

    /// Number of the present ruleset; every change makes another.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn generation(&self) -> Result<u32, NetfilterError> {
        let mut found = None;
        self.ask(MESSAGE_GET_GENERATION, FLAG_ACK, 0, &[], "read the generation", |payload| {
            found = attribute(payload, GENERATION_ID)
                .and_then(|id| id.first_chunk())
                .map(|id| u32::from_be_bytes(*id));
        })?;
        found.ok_or_else(|| {
            NetfilterError::new("read the generation", io::Error::other("the answer has none"))
        })
    }

    /// Names of the tables of a family.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn tables(&self, family: Family) -> Result<Vec<String>, NetfilterError> {
        self.dump(MESSAGE_GET_TABLE, family, &[], "list tables", |payload, found| {
            found.extend(attribute(payload, TABLE_NAME).map(without_zero));
        })
    }

    /// Whether a chain is there.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn has_chain(
        &self,
        family: Family,
        table: &str,
        chain: &str,
    ) -> Result<bool, NetfilterError> {
        let mut attributes = Vec::new();
        put_text(&mut attributes, CHAIN_TABLE, table);
        put_text(&mut attributes, CHAIN_NAME, chain);
        let request = format!("look for chain {table} {chain}");
        let number = family_number(family);
        match self.ask(MESSAGE_GET_CHAIN, FLAG_ACK, number, &attributes, &request, |_| {}) {
            Ok(()) => Ok(true),
            Err(error) if error.is_missing() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The chain of each rule of a table: how many rules every chain has.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn rule_chains(&self, family: Family, table: &str) -> Result<Vec<String>, NetfilterError> {
        let mut attributes = Vec::new();
        put_text(&mut attributes, RULE_TABLE, table);
        let request = format!("list rules of {table}");
        self.dump(MESSAGE_GET_RULE, family, &attributes, &request, |payload, found| {
            found.extend(attribute(payload, RULE_CHAIN).map(without_zero));
        })
    }

    /// The rules of a chain, in order; none if there is no such chain.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn rules(
        &self,
        family: Family,
        table: &str,
        chain: &str,
    ) -> Result<Vec<Rule>, NetfilterError> {
        let mut attributes = Vec::new();
        put_text(&mut attributes, RULE_TABLE, table);
        put_text(&mut attributes, RULE_CHAIN, chain);
        let request = format!("list rules of {table} {chain}");
        self.dump(MESSAGE_GET_RULE, family, &attributes, &request, |payload, found| {
            found.extend(parse_rule(payload));
        })
    }

    /// Elements of a set or map.
    ///
    /// # Errors
    /// [`NetfilterError::is_missing`] if there is no such set.
    pub fn elements(
        &self,
        family: Family,
        table: &str,
        set: &str,
    ) -> Result<Vec<Element>, NetfilterError> {
        let mut asked = Vec::new();
        put_text(&mut asked, LIST_TABLE, table);
        put_text(&mut asked, LIST_SET, set);
        let request = format!("list elements of {table} {set}");
        self.dump(MESSAGE_GET_ELEMENT, family, &asked, &request, |payload, found| {
            let list = attribute(payload, LIST_ELEMENTS).unwrap_or_default();
            found.extend(attributes(list).filter_map(|(_, element)| parse_element(element)));
        })
    }

    /// Makes the changes.
    ///
    /// # Errors
    /// [`NetfilterError::is_outdated`] if others have changed the ruleset since; nothing has changed then.
    pub fn commit(&self, transaction: &Transaction) -> Result<(), NetfilterError> {
        if transaction.is_empty() {
            return Ok(());
        }
        let failed = |source| {
            NetfilterError::new(&format!("change elements of table {}", transaction.table), source)
        };
        self.socket.send(&transaction.encode(), 0).map_err(failed)?;
        // The kernel has done it when `send` returns; what it has to say waits, one datagram for each message that
        // failed and one for the last.
        let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
        let mut first = None;
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, libc::MSG_DONTWAIT) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                received => received.map_err(failed)?,
            };
            for message in messages(&buffer).filter(|message| message.kind == ERROR) {
                let outcome = error_of(message.payload);
                // A refusal counts for more than that the last one alone would have been fine.
                if !matches!(first, Some(Err(_))) {
                    first = Some(outcome);
                }
            }
        }
        first.unwrap_or_else(|| Err(io::Error::other("the kernel did not answer"))).map_err(failed)
    }

    fn ask(
        &self,
        kind: u16,
        flags: u16,
        family: u8,
        attributes: &[u8],
        request: &str,
        mut read: impl FnMut(&[u8]),
    ) -> Result<(), NetfilterError> {
        self.exchange(kind, flags, family, attributes, &mut read)
            .map(drop)
            .map_err(|source| NetfilterError::new(request, source))
    }

    fn dump<T>(
        &self,
        kind: u16,
        family: Family,
        attributes: &[u8],
        request: &str,
        read: impl Fn(&[u8], &mut Vec<T>),
    ) -> Result<Vec<T>, NetfilterError> {
        let failed = |source| NetfilterError::new(request, source);
        for _ in 0..DUMP_ATTEMPTS {
            let mut found = Vec::new();
            let number = family_number(family);
            let whole = self
                .exchange(kind, FLAG_DUMP, number, attributes, &mut |payload| {
                    read(payload, &mut found);
                })
                .map_err(failed)?;
            if whole {
                return Ok(found);
            }
        }
        Err(failed(io::Error::from_raw_os_error(libc::EAGAIN)))
    }

    /// Returns whether the answer is whole, which is not so for a dump that changes interrupted.
    fn exchange(
        &self,
        kind: u16,
        flags: u16,
        family: u8,
        attributes: &[u8],
        read: &mut dyn FnMut(&[u8]),
    ) -> io::Result<bool> {
        let sequence = self.sequence.get().wrapping_add(1);
        self.sequence.set(sequence);
        let request =
            message(SUBSYSTEM << 8 | kind, FLAG_REQUEST | flags, sequence, (family, 0), attributes);
        exchange(&self.socket, &request, sequence, read)
    }
}

/// One request and all of its answer; for conntrack, too.
pub(crate) fn exchange(
    socket: &Socket,
    request: &[u8],
    sequence: u32,
    read: &mut dyn FnMut(&[u8]),
) -> io::Result<bool> {
    socket.send(request, 0)?;
    let mut whole = true;
    let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
    loop {
        buffer.clear();
        match socket.recv(&mut buffer, 0) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            received => received?,
        };
        for message in messages(&buffer).filter(|message| message.sequence == sequence) {
            whole &= message.flags & FLAG_DUMP_INTERRUPTED == 0;
            match message.kind {
                ERROR => return error_of(message.payload).map(|()| whole),
                DONE => return Ok(whole),
                // After the generic header of four bytes.
                _ => read(message.payload.get(4..).unwrap_or_default()),
            }
        }
    }
}

fn error_of(payload: &[u8]) -> io::Result<()> {
    match payload.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        None => Err(io::Error::other("an answer without a code")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_reads_back() {
        for target in
            [Target::None, Target::Value(vec![10, 1, 0, 2]), Target::Jump("chain".to_owned())]
        {
            let element =
                Element { key: vec![6, 0, 0, 0, 0, 80, 0, 0], target, comment: "cni:a".into() };
            let mut bytes = Vec::new();
            put_element(&mut bytes, &element);
            assert_eq!(parse_element(&bytes), Some(element));
        }
    }

    #[test]
    fn a_long_comment_is_cut_between_characters() {
        let comment = "ä".repeat(200);
        let element = Element { key: vec![0; 4], target: Target::None, comment };
        let mut bytes = Vec::new();
        put_element(&mut bytes, &element);
        let read = parse_element(&bytes).expect("an element");
        assert_eq!(read.comment, "ä".repeat(126));
    }

    #[test]
    fn damaged_rules_are_none_or_lead_nowhere() {
        assert_eq!(parse_rule(&[]), None);
        assert_eq!(parse_rule(&[8, 0, 3, 0, 1, 2, 3, 4]), None);
        let mut bytes = Vec::new();
        put(&mut bytes, RULE_HANDLE, &7_u64.to_be_bytes());
        put(&mut bytes, RULE_EXPRESSIONS, &[200, 0, 1, 0]);
        assert_eq!(parse_rule(&bytes), Some(Rule { handle: 7, chain: None }));
    }

    #[test]
    fn damaged_elements_are_none() {
        assert_eq!(parse_element(&[]), None);
        assert_eq!(parse_element(&[200, 0, 1, 0]), None);
        assert_eq!(comment(&[0, 200, 1]), None);
        assert_eq!(comment(&[7, 0, 0, 2, b'x', 0]), Some("x".to_owned()));
    }
}
