//! What an operator does to etcd itself: members, health, snapshots, compaction of files, and who may read what.

use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use etcd_client::{
    Client, Error as EtcdError, MemberAddOptions, Permission, PutOptions, UserAddOptions,
};
use sha2::{Digest as _, Sha256};

use crate::etcd::{EtcdConfig, chain, connect};

/// How long a snapshot may take between two pieces.
const PIECE_LIMIT: Duration = Duration::from_secs(30);
/// How long a call may take. Defragmentation of a large file stops a member for seconds.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// Bytes of the checksum behind a snapshot; the file before it is whole pages.
const SUM_BYTES: u64 = 32;
const PAGE_BYTES: u64 = 512;
/// Key that measures the time of a write; nobody reads it.
const PROBE: &str = "/orch/probe";

/// Why something cannot be done to etcd.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// etcd refused, or there is no answer.
    #[error("{step}: {why}")]
    Etcd {
        /// What was tried.
        step: String,
        /// Why it failed.
        why: String,
    },
    /// A file.
    #[error("{step} {}", path.display())]
    File {
        /// What was tried.
        step: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A snapshot is not what it should be.
    #[error("{} is no whole snapshot: {why}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

impl AdminError {
    /// What etcd waits for, if it is going to be ready for the same request by itself.
    #[must_use]
    pub fn waits_for(&self) -> Option<&'static str> {
        let Self::Etcd { why, .. } = self else { return None };
        // etcd's own words (server/etcdserver/errors), and those of a connection.
        const PASSING: [(&str, &str); 10] = [
            // Members count as healthy when they have been connected for 5 s.
            ("unhealthy cluster", "all members of etcd to have been connected for some seconds"),
            ("too many learner", "a member that joins right now to get its vote"),
            ("in sync with leader", "the new member to catch up"),
            ("not enough started members", "the members that were added before to start"),
            ("leader", "etcd to elect a leader"),
            ("timed out", "etcd to answer"),
            ("Timeout expired", "etcd to answer"),
            ("deadline", "etcd to answer"),
            ("transport error", "etcd to answer"),
            ("tcp connect error", "etcd to answer"),
        ];
        PASSING.iter().find(|(words, _)| why.contains(words)).map(|(_, what)| *what)
    }
}

/// A member of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Member {
    /// Its id, as etcd's own tools print it.
    pub id: String,
    /// Empty until it has started.
    pub name: String,
    /// Where other members reach it.
    pub peer_urls: Vec<String>,
    /// Where clients reach it.
    pub client_urls: Vec<String>,
    /// It has all data and no vote yet.
    pub learner: bool,
}

/// How one member is.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Status {
    /// Its id.
    pub id: String,
    /// Version of etcd.
    pub version: String,
    /// Whether it leads.
    pub leader: bool,
    /// Size of the file.
    pub size_bytes: i64,
    /// How much of the file is in use.
    pub used_bytes: i64,
    /// Raft index it has applied.
    pub applied: u64,
    /// What it complains of.
    pub errors: Vec<String>,
}

/// A connection for an administrator, to one member or several.
pub struct Admin {
    client: Client,
}

fn etcd(step: impl Into<String>) -> impl FnOnce(EtcdError) -> AdminError {
    let step = step.into();
    move |error| AdminError::Etcd { step, why: chain(&error) }
}

fn id(number: u64) -> String {
    format!("{number:x}")
}

impl Admin {
    /// # Errors
    /// The certificates cannot be used.
    pub async fn connect(config: &EtcdConfig) -> Result<Self, AdminError> {
        let step = format!("connect to {}", config.endpoints.join(", "));
        Ok(Self { client: connect(config, Some(CALL_LIMIT)).await.map_err(etcd(step))? })
    }

    /// All members.
    ///
    /// # Errors
    /// No answer.
    pub async fn members(&mut self) -> Result<Vec<Member>, AdminError> {
        let reply = self.client.member_list().await.map_err(etcd("list the members"))?;
        Ok(reply
            .members()
            .iter()
            .map(|member| Member {
                id: id(member.id()),
                name: member.name().to_owned(),
                peer_urls: member.peer_urls().to_vec(),
                client_urls: member.client_urls().to_vec(),
                learner: member.is_learner(),
            })
            .collect())
    }

    /// The member that this connection is to.
    ///
    /// # Errors
    /// No answer.
    pub async fn status(&mut self) -> Result<Status, AdminError> {
        let mut reply = self.client.status().await.map_err(etcd("ask for the status"))?;
        let own = reply.take_header().map_or(0, |header| header.member_id());
        Ok(Status {
            id: id(own),
            version: reply.version().to_owned(),
            leader: reply.leader() == own && own != 0,
            size_bytes: reply.db_size(),
            used_bytes: reply.raft_used_db_size(),
            applied: reply.raft_applied_index(),
            errors: reply.errors().to_vec(),
        })
    }

    /// The time that a small write takes until it is on the disks of most members: mostly `fsync`. The slowest of
    /// `rounds`.
    ///
    /// # Errors
    /// A write fails.
    pub async fn write_latency(&mut self, rounds: u32) -> Result<Duration, AdminError> {
        let mut slowest = Duration::ZERO;
        for round in 0..rounds {
            let begun = Instant::now();
            let step = "write a probe";
            self.client
                .put(PROBE, round.to_string(), Some(PutOptions::new()))
                .await
                .map_err(etcd(step))?;
            slowest = slowest.max(begun.elapsed());
        }
        self.client.delete(PROBE, None).await.map_err(etcd("remove the probe"))?;
        Ok(slowest)
    }

    /// Gives the space of deleted data back to the file system. The member does not answer meanwhile.
    ///
    /// # Errors
    /// It fails.
    pub async fn defragment(&mut self) -> Result<(), AdminError> {
        self.client.defragment().await.map(drop).map_err(etcd("defragment"))
    }

    /// Adds a member that learns first, or finds it when it is there already; returns all members.
    ///
    /// # Errors
    /// etcd refuses.
    pub async fn add_learner(&mut self, peer_url: &str) -> Result<Vec<Member>, AdminError> {
        let members = self.members().await?;
        if members.iter().any(|member| member.peer_urls.iter().any(|url| url == peer_url)) {
            return Ok(members);
        }
        self.client
            .member_add([peer_url], Some(MemberAddOptions::new().with_is_learner()))
            .await
            .map_err(etcd(format!("add the member {peer_url}")))?;
        self.members().await
    }

    /// Gives a learner its vote. Refused until it has caught up.
    ///
    /// # Errors
    /// etcd refuses.
    pub async fn promote(&mut self, member: &Member) -> Result<(), AdminError> {
        self.client
            .member_promote(number(&member.id)?)
            .await
            .map(drop)
            .map_err(etcd(format!("promote {}", member.name)))
    }

    /// Removes a member.
    ///
    /// # Errors
    /// etcd refuses.
    pub async fn remove(&mut self, member: &Member) -> Result<(), AdminError> {
        self.client
            .member_remove(number(&member.id)?)
            .await
            .map(drop)
            .map_err(etcd(format!("remove {}", member.name)))
    }

    /// Writes a snapshot of all data to `path`, whole or not at all. Returns its size.
    ///
    /// # Errors
    /// etcd breaks off, the file cannot be written, or the checksum is wrong.
    pub async fn snapshot(&mut self, path: &Path) -> Result<u64, AdminError> {
        let file_error =
            |step| move |source| AdminError::File { step, path: path.to_owned(), source };
        let temporary = path.with_extension("part");
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            // It holds every secret of the cluster.
            .mode(0o600)
            .open(&temporary)
            .map_err(file_error("write"))?;
        let outcome = self.receive(&mut file, &temporary).await;
        let checked = outcome
            .and_then(|()| file.sync_all().map_err(file_error("write")))
            .and_then(|()| verify(&temporary))
            .and_then(|size| {
                std::fs::rename(&temporary, path).map_err(file_error("rename to"))?;
                Ok(size)
            });
        if checked.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        checked
    }

    async fn receive(&mut self, file: &mut std::fs::File, path: &Path) -> Result<(), AdminError> {
        let mut stream = self.client.snapshot().await.map_err(etcd("ask for a snapshot"))?;
        loop {
            let piece =
                tokio::time::timeout(PIECE_LIMIT, stream.message()).await.map_err(|_| {
                    AdminError::Etcd {
                        step: "read the snapshot".to_owned(),
                        why: format!("nothing came for {} s", PIECE_LIMIT.as_secs()),
                    }
                })?;
            let Some(piece) = piece.map_err(etcd("read the snapshot"))? else { return Ok(()) };
            file.write_all(piece.blob()).map_err(|source| AdminError::File {
                step: "write",
                path: path.to_owned(),
                source,
            })?;
        }
    }

    /// From now on a client certificate says what its holder may do: `root` everything, `user` the keys below `prefix`.
    /// Safe to repeat.
    ///
    /// # Errors
    /// etcd refuses.
    pub async fn restrict(
        &mut self,
        root: &str,
        user: &str,
        prefix: &str,
    ) -> Result<(), AdminError> {
        if self.is_restricted(root, user, prefix).await? {
            return self.client.auth_enable().await.map(drop).map_err(etcd("close etcd"));
        }
        let no_password = || Some(UserAddOptions::new().with_no_pwd());
        // etcd asks for a user of this name before it lets itself be closed.
        for name in ["root", root] {
            exists_is_fine(self.client.user_add(name, "", no_password()).await.map(drop))
                .map_err(etcd(format!("add the user {name}")))?;
            self.client
                .user_grant_role(name, "root")
                .await
                .map_err(etcd(format!("make {name} root")))?;
        }
        exists_is_fine(self.client.role_add(user).await.map(drop))
            .map_err(etcd(format!("add the role {user}")))?;
        let permission = Permission::read_write(prefix).with_prefix();
        self.client
            .role_grant_permission(user, permission)
            .await
            .map_err(etcd(format!("let {user} use {prefix}")))?;
        exists_is_fine(self.client.user_add(user, "", no_password()).await.map(drop))
            .map_err(etcd(format!("add the user {user}")))?;
        self.client
            .user_grant_role(user, user)
            .await
            .map_err(etcd(format!("give {user} its role")))?;
        self.client.auth_enable().await.map(drop).map_err(etcd("close etcd"))
    }
}

impl Admin {
    /// Whether users, role and permission are there. Every change of them makes requests fail that are under way.
    async fn is_restricted(
        &mut self,
        root: &str,
        user: &str,
        prefix: &str,
    ) -> Result<bool, AdminError> {
        let users = self.client.user_list().await.map_err(etcd("list the users"))?;
        if !["root", root, user].iter().all(|name| users.users().iter().any(|found| found == name))
        {
            return Ok(false);
        }
        let Ok(role) = self.client.role_get(user).await else { return Ok(false) };
        let has_prefix =
            role.permissions().iter().any(|permission| permission.key() == prefix.as_bytes());
        let found = self.client.user_get(user).await.map_err(etcd("read the user"))?;
        Ok(has_prefix && found.roles().iter().any(|name| name == user))
    }
}

fn exists_is_fine(outcome: Result<(), EtcdError>) -> Result<(), EtcdError> {
    match outcome {
        Err(EtcdError::GRpcStatus(status)) if status.message().contains("already exists") => Ok(()),
        outcome => outcome,
    }
}

fn number(id: &str) -> Result<u64, AdminError> {
    u64::from_str_radix(id, 16)
        .map_err(|error| AdminError::Etcd { step: format!("member {id}"), why: error.to_string() })
}

/// Checks the checksum that etcd puts behind a snapshot; returns the size of the file.
///
/// # Errors
/// The file cannot be read, or is cut off or changed.
pub fn verify(path: &Path) -> Result<u64, AdminError> {
    let file_error = |source| AdminError::File { step: "read", path: path.to_owned(), source };
    let damaged = |why: String| AdminError::Damaged { path: path.to_owned(), why };
    let mut file = std::fs::File::open(path).map_err(file_error)?;
    let size = file.metadata().map_err(file_error)?.len();
    if size < PAGE_BYTES + SUM_BYTES || size % PAGE_BYTES != SUM_BYTES {
        return Err(damaged(format!("{size} bytes are no whole pages with a checksum behind")));
    }
    let mut left = size - SUM_BYTES;
    let mut sum = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    while left > 0 {
        let want = usize::try_from(left).unwrap_or(buffer.len()).min(buffer.len());
        file.read_exact(&mut buffer[..want]).map_err(file_error)?;
        sum.update(&buffer[..want]);
        left -= want as u64;
    }
    let mut stored = [0; SUM_BYTES as usize];
    file.seek(SeekFrom::Start(size - SUM_BYTES)).map_err(file_error)?;
    file.read_exact(&mut stored).map_err(file_error)?;
    if sum.finalize()[..] != stored {
        return Err(damaged("its checksum is wrong".to_owned()));
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_is_told_from_what_does_not() {
        let error = |why: &str| AdminError::Etcd { step: "add".to_owned(), why: why.to_owned() };
        for why in [
            "etcdserver: unhealthy cluster",
            "etcdserver: too many learner members in cluster",
            "etcdserver: can only promote a learner member which is in sync with leader",
            "etcdserver: no leader",
            "Timeout expired",
        ] {
            assert!(error(why).waits_for().is_some(), "{why}");
        }
        for why in ["etcdserver: permission denied", "etcdserver: Peer URLs already exists"] {
            assert_eq!(error(why).waits_for(), None, "{why}");
        }
    }

    #[test]
    fn a_snapshot_that_was_cut_or_changed_is_found_out() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("s.db");
        let mut bytes = vec![7_u8; 4096];
        let sum = Sha256::digest(&bytes);
        bytes.extend_from_slice(&sum);
        std::fs::write(&path, &bytes).expect("write");
        assert_eq!(verify(&path).expect("whole"), 4096 + 32);

        bytes[100] ^= 1;
        std::fs::write(&path, &bytes).expect("write");
        assert!(verify(&path).expect_err("changed").to_string().contains("checksum is wrong"));
        std::fs::write(&path, &bytes[..4000]).expect("write");
        assert!(verify(&path).is_err());
        std::fs::write(&path, "").expect("write");
        assert!(verify(&path).is_err());
    }
}
